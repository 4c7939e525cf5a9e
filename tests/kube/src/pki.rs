//! Certificates of a cluster.

use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// The files of a cluster's own authority.
pub struct Pki {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    /// Makes an authority, and the key that service account tokens are signed with.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn new(dir: &Path) -> anyhow::Result<Self> {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, "test authority");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let certificate = parameters.self_signed(&key)?;
        let pki = Self { dir: dir.to_owned(), issuer: Issuer::new(parameters, key) };
        pki.write("ca.crt", &certificate.pem())?;
        let signing = KeyPair::generate()?;
        pki.write("sa.key", &signing.serialize_pem())?;
        pki.write("sa.pub", &signing.public_key_pem())?;
        Ok(pki)
    }

    /// A certificate for a server at these addresses, or for a client by name and group: `NAME.crt` and `NAME.key`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn issue(
        &self,
        file: &str,
        name: &str,
        group: Option<&str>,
        addresses: &[IpAddr],
    ) -> anyhow::Result<()> {
        let mut parameters = CertificateParams::new(vec!["localhost".to_owned(), "kubernetes".to_owned()])?;
        parameters.distinguished_name.push(DnType::CommonName, name);
        if let Some(group) = group {
            parameters.distinguished_name.push(DnType::OrganizationName, group);
        }
        parameters.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        parameters.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = parameters.signed_by(&key, &self.issuer)?;
        self.write(&format!("{file}.crt"), &certificate.pem())?;
        self.write(&format!("{file}.key"), &key.serialize_pem())
    }

    /// The path of a file.
    pub fn path(&self, file: &str) -> String {
        self.dir.join(file).display().to_string()
    }

    fn write(&self, file: &str, text: &str) -> anyhow::Result<()> {
        write_private(&self.dir.join(file), text)
    }
}

/// Writes a file that only its owner can read.
///
/// # Errors
/// When it cannot be written.
pub fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}
