//! Protocol versions, newest last; each says what it changed.

/// Versions this build speaks, oldest first. The destination offers them; the source picks the highest it knows.
pub const SUPPORTED: &[u16] = &[V1, V2, V3];

/// The first version.
pub const V1: u16 = 1;

/// Pushed pages may come in packed frames (compressed, or as references to recent ones), and the destination may say
/// on the credit stream in which order it wants them.
pub const V2: u16 = 2;

/// The source tells more of the workload (`AdviseMore`: containers, programs) and serves files; a destination may have the
/// images already (`ReadyWithImages`), and says when it comes again what was promised never to come (`Withheld`).
/// Answers to requests may come compressed, and the source says which pages were huge.
pub const V3: u16 = 3;

/// The highest of the offered versions that this build speaks too.
pub fn select(offered: &[u16]) -> Option<u16> {
    offered
        .iter()
        .copied()
        .filter(|version| SUPPORTED.contains(version))
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_common_versions_are_selected() {
        assert_eq!(select(&[0, V1, 99]), Some(V1));
        assert_eq!(select(&[V1, V2]), Some(V2));
        assert_eq!(select(&[V3, V1]), Some(V3));
        assert_eq!(select(&[99]), None);
        assert_eq!(select(&[]), None);
    }
}
