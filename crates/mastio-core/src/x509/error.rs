//! What can go wrong with a certificate, a request or a key.

use std::fmt;

/// A reason why bytes are refused, or why something may not be signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum X509Error {
    /// The bytes are not strict DER of the expected shape. `what` names the field.
    #[error("{what} is not well-formed der")]
    Malformed {
        /// The field that could not be read.
        what: &'static str,
    },
    /// Bytes follow the end of the structure.
    #[error("trailing bytes after the {what}")]
    TrailingBytes {
        /// The structure that ended early.
        what: &'static str,
    },
    /// The text holds no PEM block of the expected kind, or a block is not base64.
    #[error("no readable pem block of kind {label}")]
    Pem {
        /// The label that was looked for.
        label: &'static str,
    },
    /// The named issuer is another one than the certificate offered as such.
    #[error("issuer name differs from the subject of the issuing certificate")]
    IssuerNameMismatch,
    /// The signature algorithm is unknown here, or does not fit the key.
    #[error("signature algorithm is not supported for this key")]
    UnsupportedSignatureAlgorithm,
    /// The signature does not verify.
    #[error("signature does not verify")]
    SignatureInvalid,
    /// The public key is not one that may be used.
    #[error("public key is refused: {reason}")]
    PublicKey {
        /// Why it is refused.
        reason: &'static str,
    },
    /// A name cannot be put into a certificate.
    #[error("{field} cannot be encoded: {reason}")]
    Name {
        /// The attribute or SAN kind.
        field: &'static str,
        /// Why it cannot be encoded.
        reason: &'static str,
    },
    /// An instant lies outside the years 0 to 9999.
    #[error("time {seconds} cannot be encoded in a certificate")]
    Time {
        /// Seconds since the Unix epoch.
        seconds: i64,
    },
    /// The certificate offered as a trust anchor may not issue certificates.
    #[error("certificate is not a ca and cannot be a trust anchor")]
    NotACertificateAuthority,
    /// Neither a SPIFFE URI nor the common name tells an agent.
    #[error("certificate names no agent")]
    NoIdentity,
    /// A revocation list cannot be made.
    #[error("revocation list is refused: {reason}")]
    Crl {
        /// Why it is refused.
        reason: &'static str,
    },
    /// The certificate to be signed breaks rules of its profile.
    #[error("certificate profile is not met: {}", Listed(findings))]
    Lint {
        /// Every rule that was broken, in the order of the lints.
        findings: Vec<Finding>,
    },
}

/// One broken rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The lint's stable name, as its file is called.
    pub lint: &'static str,
    /// What was found, in lowercase and without a full stop.
    pub detail: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.lint, self.detail)
    }
}

struct Listed<'a>(&'a [Finding]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, finding) in self.0.iter().enumerate() {
            if position > 0 {
                formatter.write_str("; ")?;
            }
            finding.fmt(formatter)?;
        }
        Ok(())
    }
}
