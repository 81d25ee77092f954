//! The kinds of messages on the control stream, by name.

use std::fmt;

/// A kind of message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message(&'static str);

impl Message {
    /// Those that the destination sends when nothing fails, in their order.
    pub const TO_SOURCE: [Self; 6] = [
        Self("Hello"),
        Self("Ready"),
        Self("Staged"),
        Self("CutoverRequest"),
        Self("Resumed"),
        Self("Drained"),
    ];
    /// Those of the source, in their order. `Huge` is only said of workloads with huge pages.
    pub const TO_DESTINATION: [Self; 7] = [
        Self("Welcome"),
        Self("Advise"),
        Self("AdviseMore"),
        Self("Freezing"),
        Self("Frozen"),
        Self("CutoverGranted"),
        Self("Complete"),
    ];
    /// Those of either end that make good for a lost link.
    pub const OF_RECOVERY: [Self; 5] = [
        Self("Resume"),
        Self("WelcomeBack"),
        Self("Present"),
        Self("Withheld"),
        Self("PresentEnd"),
    ];

    /// The question for the point of no return.
    pub const CUTOVER: Self = Self("CutoverRequest");

    /// All there are.
    pub fn all() -> impl Iterator<Item = Self> {
        let both = Self::TO_SOURCE.into_iter().chain(Self::TO_DESTINATION);
        both.chain(Self::OF_RECOVERY)
    }

    /// The kind called `name`.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|message| message.0 == name)
    }

    /// Whether `message` is of this kind: its variant's name is the kind's.
    pub fn is(self, message: &impl fmt::Debug) -> bool {
        let text = format!("{message:?}");
        let end = text.find(|letter: char| !letter.is_alphanumeric());
        text[..end.unwrap_or(text.len())] == *self.0
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

#[cfg(test)]
mod tests {
    use common::proto::control::{ToDestination, ToSource};

    use super::*;

    #[test]
    fn a_kind_is_its_variants_name() {
        let kind = |name| Message::named(name).expect("it is known");
        assert!(kind("CutoverGranted").is(&ToDestination::CutoverGranted));
        assert!(kind("Present").is(&"Present(1)".parse::<Shown>().expect("text")));
        assert!(!kind("Present").is(&ToSource::PresentEnd));
        assert_eq!(Message::named("Nonsense"), None);
    }

    /// Debugs as its text, without quotes.
    struct Shown(String);

    impl std::str::FromStr for Shown {
        type Err = std::convert::Infallible;

        fn from_str(text: &str) -> Result<Self, Self::Err> {
            Ok(Self(text.to_owned()))
        }
    }

    impl fmt::Debug for Shown {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(&self.0)
        }
    }
}
