//! The key that signs checkpoints and the head: Ed25519, kept as PKCS #8 in PEM, so that
//! `openssl genpkey -algorithm ed25519` makes one and `openssl pkey` shows it.

use std::{
    fmt, fs,
    fs::{DirBuilder, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use ed25519_dalek::{
    Signature, Signer as _, SigningKey, VerifyingKey,
    pkcs8::{
        DecodePrivateKey as _, DecodePublicKey as _, EncodePrivateKey as _, EncodePublicKey as _,
        spki::der::pem::LineEnding,
    },
};

use super::chain::{hex, unhex};

/// Longest key file that is read, in bytes.
const MOST: u64 = 16 << 10;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read or written.
    #[error("cannot {operation} key `{}`", path.display())]
    Io {
        /// `read`, `create`, ….
        operation: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file holds something else.
    #[error("`{}` is no Ed25519 {what} in PEM", path.display())]
    NoKey {
        /// Which file.
        path: PathBuf,
        /// `private key` or `public key`.
        what: &'static str,
    },
    /// The operating system gave no random bytes.
    #[error("cannot make a key: {0}")]
    Random(getrandom::Error),
}

/// Signs.
pub struct Signer(SigningKey);

/// Checks what a [`Signer`] signed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

/// Random bytes of the operating system.
pub(super) fn random<const N: usize>() -> Result<[u8; N], KeyError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(KeyError::Random)?;
    Ok(bytes)
}

// === impl Signer ===

impl Signer {
    /// The key in the file at `path`.
    pub fn open(path: &Path) -> Result<Self, KeyError> {
        let pem = read(path)?;
        SigningKey::from_pkcs8_pem(&pem)
            .map(Self)
            .map_err(|_| KeyError::NoKey {
                path: path.to_owned(),
                what: "private key",
            })
    }

    /// The key in the file at `path`, made anew when there is no such file. Returns whether it
    /// was.
    pub fn open_or_create(path: &Path) -> Result<(Self, bool), KeyError> {
        match Self::open(path) {
            Err(KeyError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Self::create(path).map(|signer| (signer, true))
            }
            other => other.map(|signer| (signer, false)),
        }
    }

    fn create(path: &Path) -> Result<Self, KeyError> {
        let error = |operation| {
            move |source| KeyError::Io {
                operation,
                path: path.to_owned(),
                source,
            }
        };
        let signer = Self::random()?;
        let pem = signer
            .0
            .to_pkcs8_pem(LineEnding::LF)
            .map_err(|_| KeyError::NoKey {
                path: path.to_owned(),
                what: "private key",
            })?;
        if let Some(dir) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(error("create the folder of"))?;
        }
        // Whole or not at all, and never over one that is there.
        let new = path.with_extension("new");
        let _stale = fs::remove_file(&new).is_ok();
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)
            .map_err(error("create"))?;
        file.write_all(pem.as_bytes()).map_err(error("write"))?;
        file.sync_all().map_err(error("write"))?;
        fs::hard_link(&new, path).map_err(error("create"))?;
        fs::remove_file(&new).map_err(error("create"))?;
        Ok(signer)
    }

    /// A key that nobody has.
    pub fn random() -> Result<Self, KeyError> {
        Ok(Self::from_bytes(&random()?))
    }

    /// The key of a secret, as RFC 8032 makes it.
    pub fn from_bytes(secret: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(secret))
    }

    /// Whether others than the owner may read the file at `path`; false where that cannot be told.
    pub fn is_exposed(path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o077 != 0)
    }

    /// The key to check with.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key())
    }

    /// The signature of `message`, 64 bytes in hexadecimal.
    pub fn sign(&self, message: &str) -> String {
        hex(&self.0.sign(message.as_bytes()).to_bytes())
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({})", self.public())
    }
}

// === impl PublicKey ===

impl PublicKey {
    /// The key in the file at `path`: a public one, or a private one's.
    pub fn open(path: &Path) -> Result<Self, KeyError> {
        let pem = read(path)?;
        if let Ok(signer) = SigningKey::from_pkcs8_pem(&pem) {
            return Ok(Self(signer.verifying_key()));
        }
        VerifyingKey::from_public_key_pem(&pem)
            .map(Self)
            .map_err(|_| KeyError::NoKey {
                path: path.to_owned(),
                what: "public key",
            })
    }

    /// The key of 64 hexadecimal characters, as events name it.
    pub fn from_hex(text: &str) -> Option<Self> {
        VerifyingKey::from_bytes(&unhex(text)?).ok().map(Self)
    }

    /// As PEM.
    pub fn to_pem(self) -> Option<String> {
        self.0.to_public_key_pem(LineEnding::LF).ok()
    }

    /// Whether `signature` is this key's of `message`.
    pub fn verifies(&self, message: &str, signature: &str) -> bool {
        // Strict: no signature has a second form, no weak key is taken.
        unhex(signature).is_some_and(|bytes| {
            self.0
                .verify_strict(message.as_bytes(), &Signature::from_bytes(&bytes))
                .is_ok()
        })
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(self.0.as_bytes()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn read(path: &Path) -> Result<String, KeyError> {
    let error = |source| KeyError::Io {
        operation: "read",
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = fs::File::open(path).map_err(error)?;
    file.take(MOST).read_to_string(&mut text).map_err(error)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_for_the_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys/audit.key");
        let (first, made) = Signer::open_or_create(&path).unwrap();
        assert!(made);
        assert!(!Signer::is_exposed(&path));
        let (second, made) = Signer::open_or_create(&path).unwrap();
        assert!(!made);
        assert_eq!(first.public(), second.public());
        assert!(PublicKey::open(&path).unwrap() == first.public());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(Signer::is_exposed(&path));
    }

    #[test]
    fn a_signature_holds_for_its_message_and_key_alone() {
        let (one, other) = (Signer::random().unwrap(), Signer::random().unwrap());
        let signature = one.sign("x");
        assert!(one.public().verifies("x", &signature));
        assert!(!one.public().verifies("y", &signature));
        assert!(!other.public().verifies("x", &signature));
        assert!(!one.public().verifies("x", &signature[2..]));
        let public = PublicKey::from_hex(&one.public().to_string()).unwrap();
        assert!(public.verifies("x", &signature));
        assert_eq!(PublicKey::from_hex("00"), None);
    }

    #[test]
    fn public_keys_travel_as_pem() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.pub");
        let public = Signer::random().unwrap().public();
        let pem = public.to_pem().unwrap();
        assert!(pem.starts_with("-----BEGIN PUBLIC KEY-----\n"));
        fs::write(&path, pem).unwrap();
        assert_eq!(PublicKey::open(&path).unwrap(), public);
        fs::write(&path, "rubbish").unwrap();
        assert!(matches!(
            PublicKey::open(&path),
            Err(KeyError::NoKey { .. })
        ));
        assert!(matches!(Signer::open(&path), Err(KeyError::NoKey { .. })));
    }
}
