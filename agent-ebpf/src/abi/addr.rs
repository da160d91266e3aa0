//! One address space for IPv4, IPv6 and IPv4-mapped IPv6 (RFC 4291, section 2.5.5.2).

use super::shared;

shared! {
    /// An address as 128 bits in network byte order; IPv4 stands as `::ffff:a.b.c.d`.
    pub struct Addr {
        /// The four words as they lie in memory, that is, each in network byte order.
        pub words: [u32; 4],
    }
}

const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

impl Addr {
    /// No address: `::`, which no packet goes to.
    pub const UNKNOWN: Self = Self { words: [0; 4] };
    /// `127.0.0.1`, mapped.
    pub const LOOPBACK_V4: Self = Self::v4([127, 0, 0, 1]);
    /// `::1`.
    pub const LOOPBACK_V6: Self = Self {
        words: [0, 0, 0, u32::from_ne_bytes([0, 0, 0, 1])],
    };

    /// An IPv4 address from its four octets.
    pub const fn v4(octets: [u8; 4]) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(octets))
    }

    /// An IPv4 address from the word that the kernel hands out (network byte order in memory).
    pub const fn from_v4_word(word: u32) -> Self {
        Self {
            words: [0, 0, MAPPED, word],
        }
    }

    /// An address from its 16 octets in network byte order.
    pub const fn from_octets(octets: [u8; 16]) -> Self {
        // SAFETY: both are 16 bytes of plain data.
        let words = unsafe { core::mem::transmute::<[u8; 16], [u32; 4]>(octets) };
        Self { words }
    }

    /// The 16 octets in network byte order.
    pub const fn octets(self) -> [u8; 16] {
        // SAFETY: both are 16 bytes of plain data.
        unsafe { core::mem::transmute::<[u32; 4], [u8; 16]>(self.words) }
    }

    /// Whether this is an IPv4 address (mapped).
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// The address itself, or the loopback address that the kernel puts in place of an
    /// unspecified one: a connect to `0.0.0.0` reaches 127.0.0.1, one to `::` reaches ::1.
    pub const fn effective(self) -> Self {
        if self.words[3] != 0 || self.words[0] != 0 || self.words[1] != 0 {
            return self;
        }
        match self.words[2] {
            0 => Self::LOOPBACK_V6,
            MAPPED => Self::LOOPBACK_V4,
            _ => self,
        }
    }

    /// Whether the address is loopback: 127.0.0.0/8, ::1, or an unspecified one (see
    /// [`Self::effective`]).
    pub const fn is_loopback(&self) -> bool {
        if self.words[0] != 0 || self.words[1] != 0 {
            return false;
        }
        match self.words[2] {
            0 => self.words[3] == 0 || self.words[3] == Self::LOOPBACK_V6.words[3],
            MAPPED => self.words[3] == 0 || self.words[3].to_ne_bytes()[0] == 127,
            _ => false,
        }
    }

    /// The IPv4 address that a translator would send this one's packets to, if the form has one:
    /// NAT64 `64:ff9b::/96` (RFC 6052) and `64:ff9b:1::/48` (RFC 8215, read as /96), 6to4
    /// `2002::/16` (RFC 3056), and the deprecated IPv4-compatible `::/96` (RFC 4291, 2.5.5.1).
    pub const fn embedded_v4(&self) -> Option<Self> {
        const NAT64: u32 = u32::from_ne_bytes([0x00, 0x64, 0xff, 0x9b]);
        let first = self.words[0].to_ne_bytes();
        let second = self.words[1].to_ne_bytes();
        if self.words[0] == NAT64 {
            let well_known = self.words[1] == 0 && self.words[2] == 0;
            let local_use = second[0] == 0 && second[1] == 1;
            if well_known || local_use {
                return Some(Self::from_v4_word(self.words[3]));
            }
        }
        if first[0] == 0x20 && first[1] == 0x02 {
            return Some(Self::v4([first[2], first[3], second[0], second[1]]));
        }
        let compatible = self.words[0] == 0 && self.words[1] == 0 && self.words[2] == 0;
        if compatible && self.words[3] != 0 && self.words[3] != Self::LOOPBACK_V6.words[3] {
            return Some(Self::from_v4_word(self.words[3]));
        }
        None
    }
}

#[cfg(not(target_arch = "bpf"))]
impl From<core::net::IpAddr> for Addr {
    fn from(ip: core::net::IpAddr) -> Self {
        match ip {
            core::net::IpAddr::V4(v4) => Self::v4(v4.octets()),
            core::net::IpAddr::V6(v6) => Self::from_octets(v6.octets()),
        }
    }
}

#[cfg(not(target_arch = "bpf"))]
impl From<Addr> for core::net::IpAddr {
    /// A mapped address comes back as IPv4.
    fn from(addr: Addr) -> Self {
        core::net::IpAddr::from(addr.octets()).to_canonical()
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use core::net::IpAddr;

    use super::*;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn v4_and_v4_mapped_are_one_address() {
        assert_eq!(addr("10.1.2.3"), addr("::ffff:10.1.2.3"));
        assert!(addr("::ffff:10.1.2.3").is_v4());
        assert_eq!(
            IpAddr::from(addr("::ffff:10.1.2.3")),
            "10.1.2.3".parse::<IpAddr>().unwrap()
        );
    }

    #[test]
    fn unspecified_addresses_are_loopback() {
        for text in [
            "0.0.0.0",
            "::",
            "::ffff:0.0.0.0",
            "127.0.0.1",
            "127.255.1.2",
            "::1",
        ] {
            assert!(addr(text).is_loopback(), "{text}");
        }
        for text in [
            "128.0.0.1",
            "::2",
            "0.0.0.1",
            "::ffff:126.0.0.1",
            "64:ff9b::7f00:1",
        ] {
            assert!(!addr(text).is_loopback(), "{text}");
        }
        assert_eq!(addr("::").effective(), addr("::1"));
        assert_eq!(addr("0.0.0.0").effective(), addr("127.0.0.1"));
        assert_eq!(addr("0.0.0.1").effective(), addr("0.0.0.1"));
    }

    #[test]
    fn embedded_addresses_are_found() {
        let v4 = Some(addr("169.254.169.254"));
        for text in [
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::169.254.169.254",
            "64:ff9b:1:abcd::169.254.169.254",
            "2002:a9fe:a9fe::1",
            "::169.254.169.254",
        ] {
            assert_eq!(addr(text).embedded_v4(), v4, "{text}");
        }
        for text in [
            "::1",
            "::",
            "64:ff9b:2::1.2.3.4",
            "2001:db8::1",
            "::ffff:1.2.3.4",
        ] {
            assert_eq!(addr(text).embedded_v4(), None, "{text}");
        }
    }
}
