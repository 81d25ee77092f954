//! What a source may say of its host and its workload that makes a migration impossible.

use std::fmt;

use common::proto::control::WorkloadFacts;

/// One such claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// Its machine is another.
    Architecture,
    /// Its pages are larger.
    PageSize,
    /// Its CPU has instructions that no other has.
    CpuFeature,
    /// Its CRIU is newer than any.
    Criu,
    /// Its workload has more memory than there is.
    Memory,
}

impl Claim {
    /// All there are, by name.
    const ALL: [(Self, &str); 5] = [
        (Self::Architecture, "architecture"),
        (Self::PageSize, "page-size"),
        (Self::CpuFeature, "cpu-feature"),
        (Self::Criu, "criu"),
        (Self::Memory, "memory"),
    ];

    /// The claim of that name.
    pub fn named(name: &str) -> Option<Self> {
        let found = Self::ALL.iter().find(|(_, its_name)| *its_name == name);
        found.map(|(claim, _)| *claim)
    }

    /// Puts it into what the source says.
    pub fn make(self, facts: &mut WorkloadFacts) {
        match self {
            Self::Architecture => facts.architecture = String::from("pdp11"),
            Self::PageSize => facts.page_size *= 16,
            Self::CpuFeature => facts.cpu_features.push(String::from("avx512_unheard_of")),
            Self::Criu => facts.criu = String::from("9.9.0"),
            // A petabyte.
            Self::Memory => facts.resident_pages = 1 << 38,
        }
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = Self::ALL.iter().find(|(claim, _)| claim == self);
        f.write_str(found.map_or("", |(_, name)| name))
    }
}
