//! What the path between the two hosts is to be like, as a user writes it: `veth`, `1g`, `rtt=10ms,loss=0.1%,rate=1g`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// Payload of an Ethernet frame.
const ETHERNET_MTU: u32 = 1500;
/// A queue holds this long at the path's rate when the round trip is shorter: an ordinary switch port.
const SHORTEST_QUEUE: Duration = Duration::from_millis(2);
/// No queue is smaller than a few batches of segmentation offload.
const SMALLEST_QUEUE: u64 = 256 << 10;

/// The kind of device that makes the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A pair of virtual Ethernet devices, as fast as the kernel.
    Bare,
    /// The same with the kernel's token bucket on both ends.
    Shaped,
    /// Our own emulator.
    Emulated,
}

/// A path. Everything holds for each direction by itself.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PathSpec {
    /// Time to the other end and back.
    pub rtt: Duration,
    /// Added to each packet's delay, evenly from none to this; packets keep their order.
    pub jitter: Duration,
    /// Of how many packets one is lost, as a fraction.
    pub loss: f64,
    /// Bits per second.
    pub rate: Option<u64>,
    /// Bytes that wait for the rate, beyond which packets are dropped.
    pub queue: Option<u64>,
    /// Largest IP packet.
    pub mtu: u32,
    /// The seed of loss and jitter.
    pub seed: u64,
    /// Emulated although a device of the kernel could be like this.
    emulated: bool,
}

impl Default for PathSpec {
    fn default() -> Self {
        Self {
            rtt: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            rate: None,
            queue: None,
            mtu: ETHERNET_MTU,
            seed: 1,
            emulated: false,
        }
    }
}

impl PathSpec {
    /// What it takes to make the path.
    pub fn kind(&self) -> Kind {
        let bent = !self.rtt.is_zero() || !self.jitter.is_zero() || self.loss > 0.0;
        match (self.emulated || bent, self.rate) {
            (true, _) => Kind::Emulated,
            (false, Some(_)) => Kind::Shaped,
            (false, None) => Kind::Bare,
        }
    }

    /// Bytes the queue before the rate holds: what was asked for, else one round trip's worth.
    pub fn queue_bytes(&self) -> u64 {
        let time = self.rtt.max(SHORTEST_QUEUE).as_secs_f64();
        let product = self.rate.unwrap_or(0) as f64 / 8.0 * time;
        self.queue
            .unwrap_or_else(|| (product as u64).max(SMALLEST_QUEUE))
    }

    fn set(&mut self, word: &str) -> Result<()> {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        match name {
            // What `Display` calls them; the other words say it all.
            "veth" | "shaped" => {}
            "emulated" => self.emulated = true,
            "rtt" => self.rtt = duration(value)?,
            "jitter" => self.jitter = duration(value)?,
            "loss" => self.loss = fraction(value)?,
            "rate" => self.rate = Some(scaled(value)?),
            "queue" => self.queue = Some(scaled(value)?),
            "mtu" => self.mtu = value.parse()?,
            "seed" => self.seed = value.parse()?,
            _ => self.rate = Some(scaled(word)?),
        }
        Ok(())
    }
}

impl FromStr for PathSpec {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut spec = Self::default();
        for word in text.split(',') {
            spec.set(word.trim())
                .with_context(|| format!("{word:?} in the path {text:?}"))?;
        }
        ensure!((576..=65535).contains(&spec.mtu), "no IP path has this mtu");
        spec.emulated = spec.kind() == Kind::Emulated;
        Ok(spec)
    }
}

impl fmt::Display for PathSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind() {
            Kind::Bare => "veth",
            Kind::Shaped => "shaped",
            Kind::Emulated => "emulated",
        })?;
        if !self.rtt.is_zero() {
            write!(f, ",rtt={}", shown(self.rtt))?;
        }
        if !self.jitter.is_zero() {
            write!(f, ",jitter={}", shown(self.jitter))?;
        }
        if self.loss > 0.0 {
            write!(f, ",loss={}%", self.loss * 100.0)?;
        }
        if let Some(rate) = self.rate {
            match rate % 1_000_000_000 {
                0 => write!(f, ",rate={}g", rate / 1_000_000_000)?,
                _ => write!(f, ",rate={}m", rate as f64 / 1e6)?,
            }
        }
        if let Some(queue) = self.queue {
            write!(f, ",queue={queue}")?;
        }
        if self.mtu != ETHERNET_MTU {
            write!(f, ",mtu={}", self.mtu)?;
        }
        Ok(())
    }
}

fn shown(time: Duration) -> String {
    match time.subsec_micros() % 1000 {
        0 => format!("{}ms", time.as_millis()),
        _ => format!("{}us", time.as_micros()),
    }
}

fn duration(text: &str) -> Result<Duration> {
    let (number, unit) = split_unit(text);
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        _ => bail!("{text:?} is no time: write 10ms"),
    };
    Duration::try_from_secs_f64(number.parse::<f64>()? * seconds).context("no useful time")
}

fn fraction(text: &str) -> Result<f64> {
    let percent: f64 = text
        .strip_suffix('%')
        .context("write a loss as 0.1%")?
        .parse()?;
    ensure!((0.0..100.0).contains(&percent), "loss is 0 to 100 %");
    Ok(percent / 100.0)
}

fn scaled(text: &str) -> Result<u64> {
    let (number, unit) = split_unit(text);
    let factor = match unit {
        "" => 1,
        "k" => 1_000,
        "m" => 1_000_000,
        "g" => 1_000_000_000,
        _ => bail!("{text:?} is no number: write 1g or 500m"),
    };
    Ok((number.parse::<f64>()? * f64::from(factor)) as u64)
}

fn split_unit(text: &str) -> (&str, &str) {
    let end = text
        .find(|letter: char| letter.is_ascii_alphabetic())
        .unwrap_or(text.len());
    text.split_at(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> PathSpec {
        text.parse().expect("a path")
    }

    #[test]
    fn a_path_says_how_it_is_made() {
        assert_eq!(spec("veth").kind(), Kind::Bare);
        assert_eq!(spec("veth,mtu=9000").kind(), Kind::Bare);
        assert_eq!(spec("10g").kind(), Kind::Shaped);
        assert_eq!(spec("rtt=10ms,loss=0.1%,rate=1g").kind(), Kind::Emulated);
        assert_eq!(spec("emulated,rate=1g").kind(), Kind::Emulated);
    }

    #[test]
    fn numbers_have_units() {
        let path = spec("rtt=10ms,loss=0.1%,rate=1g");
        assert_eq!(path.rtt, Duration::from_millis(10));
        assert!((path.loss - 0.001).abs() < 1e-12);
        assert_eq!(path.rate, Some(1_000_000_000));
        assert_eq!(path.queue_bytes(), 1_250_000);
        assert_eq!(spec("1g").queue_bytes(), 256 << 10);
        assert_eq!(spec("2.5g").rate, Some(2_500_000_000));
    }

    #[test]
    fn what_it_prints_it_reads() {
        for text in ["veth", "1g", "rtt=50ms,loss=1%,rate=1g,jitter=300us"] {
            let once = spec(text);
            let printed = once.to_string();
            assert_eq!(spec(&printed), once, "{printed}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "fast", "rtt=10", "loss=1", "loss=200%", "mtu=1"] {
            assert!(text.parse::<PathSpec>().is_err(), "{text:?}");
        }
    }
}
