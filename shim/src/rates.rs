//! How much a pod's network interfaces and disks may carry in a second.

use std::num::NonZeroU64;
use std::str::FromStr;

use mayu_vmm_api::RateLimit;
use serde::Deserialize;

/// The word for no limit.
const UNLIMITED: &str = "unlimited";

/// The highest rate; more than that is no limit.
const MAX_RATE: u64 = 1_000_000_000_000;

/// The longest burst, in milliseconds.
pub const MAX_BURST_MS: u32 = 60_000;

/// What a number may end with, as in Kubernetes' quantities.
const SUFFIXES: [(&str, u64); 7] = [
    ("", 1),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
];

/// The limits. Those of the network hold for each interface and direction, those of disks for each disk, reads and writes
/// together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rates {
    /// Bytes a second.
    pub net_bandwidth: Rate,
    /// Packets a second.
    pub net_packets: Rate,
    /// Bytes a second.
    pub block_bandwidth: Rate,
    /// Requests a second.
    pub block_operations: Rate,
    /// How much may go at once after a time of less, in milliseconds' worth of each rate.
    pub burst_ms: u32,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            net_bandwidth: Rate::default(),
            net_packets: Rate::default(),
            block_bandwidth: Rate::default(),
            block_operations: Rate::default(),
            burst_ms: 1000,
        }
    }
}

impl Rates {
    /// Those of a network interface.
    pub fn net(&self) -> RateLimit {
        self.limit(self.net_bandwidth, self.net_packets)
    }

    /// Those of a disk.
    pub fn block(&self) -> RateLimit {
        self.limit(self.block_bandwidth, self.block_operations)
    }

    fn limit(&self, bandwidth: Rate, operations: Rate) -> RateLimit {
        RateLimit { bandwidth: bandwidth.0, operations: operations.0, burst_ms: self.burst_ms }
    }
}

/// So many a second, or as many as come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Rate(Option<NonZeroU64>);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == UNLIMITED {
            return Ok(Self(None));
        }
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, suffix) = text.split_at(end);
        let unit = SUFFIXES.iter().find(|(name, _)| *name == suffix).map(|(_, unit)| *unit);
        let rate = digits.parse::<u64>().ok().zip(unit).and_then(|(number, unit)| number.checked_mul(unit));
        let rate = rate.filter(|rate| *rate <= MAX_RATE).and_then(NonZeroU64::new);
        rate.map(|rate| Self(Some(rate))).ok_or_else(|| {
            format!(
                "is not a whole number between 1 and 1000G, with k, M, G, Ki, Mi or Gi behind it or without, nor {UNLIMITED:?}"
            )
        })
    }
}

impl TryFrom<String> for Rate {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map_err(|reason| format!("{text:?} {reason}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(number: u64) -> Rate {
        Rate(NonZeroU64::new(number))
    }

    #[test]
    fn numbers_are_written_as_kubernetes_writes_them() {
        for (text, number) in [
            ("1", 1),
            ("1500", 1500),
            ("10k", 10_000),
            ("10M", 10_000_000),
            ("1000G", MAX_RATE),
            ("64Ki", 65_536),
            ("1Mi", 1 << 20),
            ("2Gi", 1 << 31),
            ("007", 7),
        ] {
            assert_eq!(text.parse(), Ok(rate(number)), "{text}");
        }
        assert_eq!("unlimited".parse(), Ok(Rate(None)));
    }

    #[test]
    fn everything_else_is_none() {
        for text in [
            "",
            "0",
            "0k",
            "-1",
            "+1",
            "1.5M",
            "1e6",
            "100m",
            "10 M",
            " 1",
            "1\n",
            "M",
            "10K",
            "10MB",
            "1001G",
            "1000000000001",
            "18446744073709551616",
            "18446744073709551615Gi",
            "٣",
            "1é",
            "none",
            "Unlimited",
        ] {
            assert!(text.parse::<Rate>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn each_limit_gets_where_it_belongs() {
        let rates = Rates {
            net_bandwidth: rate(1),
            net_packets: rate(2),
            block_bandwidth: rate(3),
            block_operations: Rate(None),
            burst_ms: 5,
        };
        let (bandwidth, operations) = (NonZeroU64::new(1), NonZeroU64::new(2));
        assert_eq!(rates.net(), RateLimit { bandwidth, operations, burst_ms: 5 });
        assert_eq!(rates.block(), RateLimit { bandwidth: NonZeroU64::new(3), operations: None, burst_ms: 5 });
    }
}
