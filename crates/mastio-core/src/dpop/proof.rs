//! One DPoP proof: parsed, then verified against the request that carried it.

use serde_json::Value;

use crate::{
    time::UnixTime,
    token::{
        ClaimFault, JTI_CHARACTERS_MAX,
        claims::access_token_hash,
        jwk::{JwkError, PublicJwk},
        jws::{JwsAlgorithm, JwsError, UnverifiedJws},
        text_claim, time_claim,
    },
};

/// Seconds that `iat` may lie in the past, inclusive.
pub const PROOF_AGE_S_MAX: i64 = 60;
/// Seconds that `iat` may lie in the future, inclusive.
pub const FUTURE_S_MAX: i64 = 5;
/// Bytes of an `htu`, at most.
pub const HTU_BYTES_MAX: usize = 2048;
/// Characters of a `nonce`, at most.
const NONCE_CHARACTERS_MAX: usize = 128;
/// Characters of an `htm`, at most. Methods are short words.
const HTM_CHARACTERS_MAX: usize = 32;

/// Why a DPoP proof was refused. All are answered with 401.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// The JWS is malformed, or its signature is not by the key it names.
    #[error("proof is no jws signed by its own key")]
    Jws(#[from] JwsError),
    /// `typ` is not `dpop+jwt`.
    #[error("proof typ is not dpop+jwt")]
    Type,
    /// `jwk` is missing.
    #[error("proof names no key")]
    MissingKey,
    /// `jwk` is not an accepted public key.
    #[error("proof names a key that is not accepted")]
    Key(#[source] JwkError),
    /// A required claim is missing.
    #[error("proof claim {0} is missing")]
    MissingClaim(&'static str),
    /// A claim has the wrong type or length.
    #[error("proof claim {0} is malformed")]
    MalformedClaim(&'static str),
    /// `iat` is too long ago.
    #[error("proof iat {issued_at} is more than 60 s before now {now}")]
    Stale {
        /// The claim `iat`, in Unix seconds.
        issued_at: i64,
        /// The time of the request, in Unix seconds.
        now: i64,
    },
    /// `iat` is too far ahead.
    #[error("proof iat {issued_at} is more than 5 s after now {now}")]
    FutureIssued {
        /// The claim `iat`, in Unix seconds.
        issued_at: i64,
        /// The time of the request, in Unix seconds.
        now: i64,
    },
    /// `htm` is not the request's method.
    #[error("proof htm is not the request's method {expected}")]
    HtmMismatch {
        /// The request's method.
        expected: String,
    },
    /// `htu` is none of the request's URLs. Usually the public URL is configured wrongly.
    #[error("proof htu {got} is none of the request's urls {expected}")]
    HtuMismatch {
        /// The claim `htu`, normalized: no user, query or fragment is in it.
        got: String,
        /// The acceptable URLs, normalized, joined by a comma.
        expected: String,
    },
    /// `ath` is missing or not the hash of the access token.
    #[error("proof ath is not the hash of the access token")]
    AthMismatch,
    /// A nonce is required and the proof has none.
    #[error("proof carries no nonce")]
    NonceMissing,
    /// A nonce is required and the proof's is not accepted (any more).
    #[error("proof nonce is not accepted")]
    NonceMismatch,
}

impl ProofError {
    /// The stable name of this refusal, for logs and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Jws(error) => error.reason(),
            Self::Type => "proof_type",
            Self::MissingKey => "proof_missing_key",
            Self::Key(error) => error.reason(),
            Self::MissingClaim(_) => "proof_missing_claim",
            Self::MalformedClaim(_) => "proof_malformed_claim",
            Self::Stale { .. } => "proof_stale",
            Self::FutureIssued { .. } => "proof_future_issued",
            Self::HtmMismatch { .. } => "proof_htm_mismatch",
            Self::HtuMismatch { .. } => "proof_htu_mismatch",
            Self::AthMismatch => "proof_ath_mismatch",
            Self::NonceMissing => "proof_nonce_missing",
            Self::NonceMismatch => "proof_nonce_mismatch",
        }
    }

    /// Whether the answer must hand out a nonce and ask for another proof (RFC 9449 §8 and §9).
    #[must_use]
    pub fn asks_for_nonce(&self) -> bool {
        matches!(self, Self::NonceMissing | Self::NonceMismatch)
    }
}

/// The request that a proof must fit.
#[derive(Debug, Clone, Copy)]
pub struct ProofRequest<'a> {
    /// The method.
    pub method: &'a str,
    /// Every acceptable external URL of this request, with path, without query. One that is no URL fits nothing.
    pub urls: &'a [String],
    /// The access token that came along; its hash is then demanded as `ath`. `None` where a token is asked for.
    pub access_token: Option<&'a str>,
    /// The nonces accepted now, where one is required. `None`: not required, and a `nonce` claim is ignored.
    pub nonce: Option<&'a [String]>,
    /// The time of the request.
    pub now: UnixTime,
}

/// A DPoP proof that fits its request.
///
/// What it does not say: whether it was used before, or whether its key is the token's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// The thumbprint of the key that signed, 43 characters.
    pub jkt: String,
    /// The claim `jti`, 1 to 128 characters. Unique for each key within the window, if the sender is honest.
    pub jwt_id: String,
    /// The claim `iat`.
    pub issued_at: UnixTime,
}

/// A DPoP proof, parsed and not yet verified.
#[derive(Debug, Clone)]
pub struct UnverifiedProof {
    jws: UnverifiedJws,
    key: PublicJwk,
}

impl UnverifiedProof {
    /// Parses a proof: its form, its type, its algorithm and its key.
    ///
    /// Errors: [`ProofError::Jws`]; [`ProofError::Type`]; [`ProofError::MissingKey`]; [`ProofError::Key`],
    /// which includes private members.
    /// Source: RFC 9449 §4.3, steps 2 to 5 and 7.
    pub fn parse(text: &str) -> Result<Self, ProofError> {
        let jws = UnverifiedJws::parse(text)?;
        let header = jws.unverified_header();
        if header.get("typ").and_then(Value::as_str) != Some("dpop+jwt") {
            return Err(ProofError::Type);
        }
        if !matches!(jws.algorithm(), Some(JwsAlgorithm::Es256 | JwsAlgorithm::Ps256)) {
            return Err(JwsError::Algorithm.into());
        }
        let key = header.get("jwk").ok_or(ProofError::MissingKey)?;
        let key = PublicJwk::from_value(key).map_err(ProofError::Key)?;
        Ok(Self { jws, key })
    }

    /// Verifies the proof against the request that carried it.
    ///
    /// Shape: `htm` is compared without regard to case, `htu` as [`normalize_url`] writes it.
    /// Units: `iat` is whole seconds, from `now` − [`PROOF_AGE_S_MAX`] to `now` + [`FUTURE_S_MAX`], both
    /// inclusive.
    /// Errors: the first that applies, in this order: signature, `jti`, `iat`, `htm`, `htu`, `ath`, `nonce`.
    /// Not here: replay of `jti`, and whether the key is the token's.
    /// Source: RFC 9449 §4.3, steps 6 and 8 to 12.
    pub fn verify(&self, request: &ProofRequest<'_>) -> Result<Proof, ProofError> {
        self.jws.verify(&self.key, &[JwsAlgorithm::Es256, JwsAlgorithm::Ps256])?;
        let claims = self.jws.unverified_claims()?;
        let text = |name, characters_max| text_claim(&claims, name, characters_max).map_err(named(name));

        let jwt_id = text("jti", JTI_CHARACTERS_MAX)?;
        let issued_at = time_claim(&claims, "iat").map_err(named("iat"))?;
        let age_s = request.now.since(issued_at);
        if age_s > PROOF_AGE_S_MAX {
            return Err(ProofError::Stale { issued_at: issued_at.0, now: request.now.0 });
        }
        if age_s < -FUTURE_S_MAX {
            return Err(ProofError::FutureIssued { issued_at: issued_at.0, now: request.now.0 });
        }
        if !text("htm", HTM_CHARACTERS_MAX)?.eq_ignore_ascii_case(request.method) {
            return Err(ProofError::HtmMismatch { expected: request.method.to_owned() });
        }
        let htu = normalize_url(&text("htu", HTU_BYTES_MAX)?).ok_or(ProofError::MalformedClaim("htu"))?;
        let urls: Vec<String> = request.urls.iter().filter_map(|url| normalize_url(url)).collect();
        if !urls.contains(&htu) {
            return Err(ProofError::HtuMismatch { got: htu, expected: urls.join(", ") });
        }
        if let Some(access_token) = request.access_token {
            let ath = claims.get("ath").and_then(Value::as_str);
            if ath != Some(access_token_hash(access_token).as_str()) {
                return Err(ProofError::AthMismatch);
            }
        }
        if let Some(accepted) = request.nonce {
            match text("nonce", NONCE_CHARACTERS_MAX) {
                Ok(nonce) if accepted.contains(&nonce) => {}
                Err(ProofError::MissingClaim(_)) => return Err(ProofError::NonceMissing),
                _ => return Err(ProofError::NonceMismatch),
            }
        }
        Ok(Proof { jkt: self.key.thumbprint(), jwt_id, issued_at })
    }
}

/// Writes a URL in the form in which `htu` is compared. `None` if it is no such URL.
///
/// Shape: scheme and authority lowercase, `ws` as `http` and `wss` as `https`, no default port, no query
/// and no fragment, an empty path as `/`. The rest of the path stays as it is, so that a dot segment or an
/// escaped letter never stands for another path than the router saw.
/// Errors: `None` for another scheme, a user, a port that is no number, a backslash, or any character
/// outside printable ASCII; two parsers disagree about each of these.
/// Source: RFC 9449 §4.3 on normalization, RFC 3986 §6.2.2.1 and §6.2.3.
#[must_use]
pub fn normalize_url(url: &str) -> Option<String> {
    if url.len() > HTU_BYTES_MAX || !url.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'\\') {
        return None;
    }
    let (url, _) = url.split_once(['?', '#']).unwrap_or((url, ""));
    let (scheme, rest) = url.split_once("://")?;
    let (scheme, default_port) = match scheme.to_ascii_lowercase().as_str() {
        "http" | "ws" => ("http", "80"),
        "https" | "wss" => ("https", "443"),
        _ => return None,
    };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let authority = authority.to_ascii_lowercase();
    // The colons of an IPv6 address stand inside brackets.
    let host_ends = authority.rfind(']').map_or(0, |bracket| bracket + 1);
    let (host, port) = match authority.get(host_ends..)?.find(':') {
        Some(colon) => (authority.get(..host_ends + colon)?, authority.get(host_ends + colon + 1..)?),
        None => (authority.as_str(), ""),
    };
    let port_fits = port.is_empty()
        || (port.len() <= 5 && !port.starts_with('0') && port.bytes().all(|byte| byte.is_ascii_digit()));
    if host.is_empty() || host.contains('@') || !port_fits {
        return None;
    }
    let path = if path.is_empty() { "/" } else { path };
    if port.is_empty() || port == default_port {
        Some(format!("{scheme}://{host}{path}"))
    } else {
        Some(format!("{scheme}://{host}:{port}{path}"))
    }
}

fn named(name: &'static str) -> impl Fn(ClaimFault) -> ProofError {
    move |fault| match fault {
        ClaimFault::Missing => ProofError::MissingClaim(name),
        ClaimFault::Malformed => ProofError::MalformedClaim(name),
    }
}
