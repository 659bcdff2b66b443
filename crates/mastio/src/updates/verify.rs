//! Judges what a migration made, with code that did not make it.

use mastio_core::time::UnixTime;
use mastio_core::x509::extension::{
    AUTHORITY_KEY_IDENTIFIER, BASIC_CONSTRAINTS, EXTENDED_KEY_USAGE, KEY_USAGE, SUBJECT_KEY_IDENTIFIER,
};
use mastio_core::x509::path::{self, PathError};
use mastio_core::x509::{Certificate, ObjectIdentifier, Role, lints};

use super::error::UpdateError;
use super::halt::EnrollmentType;
use super::migration::{After, Cell, Expected, FleetAfter, FleetRow, LeafRule};

/// What completing a leaf may add, besides the AKI.
const ADDED: [ObjectIdentifier; 4] =
    [BASIC_CONSTRAINTS, KEY_USAGE, EXTENDED_KEY_USAGE, SUBJECT_KEY_IDENTIFIER];

fn failed(what: impl Into<String>, cause: Option<PathError>) -> UpdateError {
    UpdateError::Verification { what: what.into(), cause }
}

/// The intermediate under the Org CA, by the full rules, the root's own `pathLen` included.
pub(super) fn authority(result: &Expected, now: UnixTime) -> Result<(), UpdateError> {
    path::verify_ca_chain(&result.mastio_ca, &result.org_ca, now)
        .map_err(|cause| failed("the intermediate under the Org CA", Some(cause)))?;
    if let Some(replaced) = &result.replaced_org_ca {
        if replaced.subject_der() != result.org_ca.subject_der() {
            return Err(failed("the Org CA's name, which must stay", None));
        }
        if replaced.not_after() != result.org_ca.not_after() {
            return Err(failed("the Org CA's notAfter, which must stay", None));
        }
        if replaced.spki_der() == result.org_ca.spki_der() {
            return Err(failed("the Org CA's key, which must be new", None));
        }
    }
    for [before, after] in &result.reissued {
        reissued(before, after, result)?;
    }
    Ok(())
}

/// A CA certificate that was issued again: the same name, key and beginning, not a second longer, and nothing that
/// the full profile finds fault with.
fn reissued(before: &Certificate, after: &Certificate, result: &Expected) -> Result<(), UpdateError> {
    let at = |what: &str| failed(format!("{}: {what}", after.subject_display()), None);
    for (what, holds) in [
        ("subject", before.subject_der() == after.subject_der()),
        ("public key", before.spki_der() == after.spki_der()),
        ("key identifier", Some(before.key_id().as_slice()) == after.subject_key_id()),
        ("notBefore", before.not_before_der() == after.not_before_der()),
        ("notAfter", after.not_after() <= before.not_after()),
        ("serial, which must be fresh", before.serial() != after.serial()),
    ] {
        if !holds {
            return Err(at(what));
        }
    }
    let is_root = after.is_self_issued();
    if is_root && before.basic_constraints() != after.basic_constraints() {
        return Err(at("basicConstraints, which must stay"));
    }
    // Who pins the former root finds the same way.
    if is_root && result.mastio_ca.verify_signature(before).is_err() {
        return Err(at("the intermediate under the former certificate"));
    }
    let issuer = if is_root { after } else { &result.org_ca };
    if let Some(finding) = lints::full_findings(after, issuer, Role::CertificateAuthority).first() {
        return Err(at(&finding.detail));
    }
    after.verify_signature(issuer).map_err(|_| at("signature"))
}

/// What the engine writes as text is public: a key goes by [`After::Key`], which seals it.
pub(super) fn cells(cells: &[(Cell, After)]) -> Result<(), UpdateError> {
    for (cell, after) in cells {
        if matches!(after, After::Text(text) if holds_a_private_key(text)) {
            return Err(failed(format!("{}: a private key in clear", cell.place()), None));
        }
    }
    Ok(())
}

fn holds_a_private_key(text: &str) -> bool {
    text.contains("PRIVATE KEY-----")
}

/// One row of the fleet by the rule for its column.
pub(super) fn row(
    row: &FleetRow,
    after: &FleetAfter,
    result: Option<&Expected>,
    now: UnixTime,
) -> Result<(), UpdateError> {
    if holds_a_private_key(&after.text) {
        return Err(failed(format!("{}: a private key in clear", row.agent_id), None));
    }
    match (&row.leaf, &after.leaf, result) {
        (Some(before), Some(new), Some(result)) => leaf(row, before, new, &after.text, result, now),
        (None, None, None) => tag(row, &after.text),
        _ => Err(failed(format!("{}: a certificate where none belongs", row.agent_id), None)),
    }
}

/// An enrollment tag: one of the field's own, and of the meaning that the former one had.
fn tag(row: &FleetRow, after: &str) -> Result<(), UpdateError> {
    let own = EnrollmentType::ALL.into_iter().find(|enrollment_type| enrollment_type.as_str() == after);
    if own != Some(EnrollmentType::from_tag(Some(&row.text))) {
        return Err(failed(format!("{}: enrollment {}, which became {after}", row.agent_id, row.text), None));
    }
    Ok(())
}

/// One leaf: its path, and every field that had to stay, byte for byte.
///
/// A live leaf is validated in full; one that has expired by its signature and fields, because no path is valid then.
fn leaf(
    row: &FleetRow,
    before: &Certificate,
    new: &Certificate,
    text: &str,
    result: &Expected,
    now: UnixTime,
) -> Result<(), UpdateError> {
    let at = |what: &str| failed(format!("{}: {what}", row.agent_id), None);
    for (what, same) in [
        ("subject", before.subject_der() == new.subject_der()),
        ("public key", before.spki_der() == new.spki_der()),
        ("validity", before.validity_der() == new.validity_der()),
    ] {
        if !same {
            return Err(at(what));
        }
    }
    let chain = Certificate::chain_from_pem(text).map_err(|_| at("text"))?;
    if result.leaves == LeafRule::Kept {
        if chain.first() != Some(before) || new != before {
            return Err(at("certificate, which must stay"));
        }
        if !chain.contains(&result.mastio_ca) {
            return Err(at("the intermediate that follows it"));
        }
    } else {
        if chain != [new.clone(), result.mastio_ca.clone()] {
            return Err(at("text, which has to be the leaf and the intermediate"));
        }
        signed_anew(before, new, result).map_err(at)?;
    }
    if new.not_before() <= now && now < new.not_after() {
        // The intermediate's own path under the root is judged once, in `authority`.
        path::validate_strict(new, &[], &result.mastio_ca, now)
            .map(drop)
            .map_err(|cause| failed(format!("{}: certification path", row.agent_id), Some(cause)))
    } else {
        new.verify_signature(&result.mastio_ca).map_err(|_| at("signature"))
    }
}

/// What a leaf that was signed anew must have besides: the owner's extensions, a fresh serial, the issuer's AKI.
fn signed_anew(before: &Certificate, new: &Certificate, result: &Expected) -> Result<(), &'static str> {
    let others = |certificate: &Certificate| -> Vec<(ObjectIdentifier, Vec<u8>)> {
        certificate
            .extensions()
            .iter()
            .filter(|extension| extension.oid() != AUTHORITY_KEY_IDENTIFIER)
            .map(|extension| (extension.oid(), extension.raw().to_vec()))
            .collect()
    };
    let (mut had, mut has) = (others(before), others(new));
    if result.leaves == LeafRule::Completed {
        if !lints::complete_findings(new, &result.mastio_ca).is_empty() {
            return Err("the agent profile");
        }
        // What was added is there only because it was missing.
        let missing = |oid: ObjectIdentifier| !had.iter().any(|(present, _)| *present == oid);
        has.retain(|(oid, _)| !(ADDED.contains(oid) && missing(*oid)));
        had.sort_unstable();
        has.sort_unstable();
    }
    if had != has {
        return Err("extensions");
    }
    if before.serial() == new.serial() {
        return Err("serial, which must be fresh");
    }
    if new.authority_key_id() != Some(result.mastio_ca.key_id().as_slice()) {
        return Err("authority key identifier");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use mastio_core::x509::{Names, Validity, profile, resign};

    use super::*;
    use crate::entropy::Entropy;
    use crate::pki::keys::PrivateKey;
    use crate::updates::halt::ExemptPermit;

    const NOW: UnixTime = UnixTime(1_795_400_000);
    const YEAR_S: i64 = 365 * 86_400;

    struct Pki {
        entropy: Entropy,
        permit: ExemptPermit,
        root_key: PrivateKey,
        root: Certificate,
        ca_key: PrivateKey,
        ca: Certificate,
        leaf_spki: Vec<u8>,
    }

    fn life(seconds: i64) -> Validity {
        Validity { not_before: NOW.plus(-60), not_after: NOW.plus(seconds) }
    }

    fn names(common_name: &str) -> Names {
        Names { common_name: common_name.to_owned(), organization: Some("acme".to_owned()) }
    }

    impl Pki {
        fn new() -> Self {
            let entropy = Entropy::default();
            let permit = ExemptPermit::for_run();
            let (root_key, ca_key) =
                (PrivateKey::generate_p256().unwrap().key, PrivateKey::generate_p256().unwrap().key);
            let leaf_spki = PrivateKey::generate_p256().unwrap().key.spki_der().to_vec();
            let algorithm = root_key.signature_algorithm();
            let tbs = profile::org_ca(
                names("acme CA"),
                root_key.spki_der(),
                &entropy.serial(),
                life(9 * YEAR_S),
                1,
                algorithm,
            );
            let root = root_key.sign_certificate(&permit, tbs.unwrap()).unwrap();
            let ca = Self::intermediate(&entropy, &permit, (&root, &root_key), &ca_key, 5 * YEAR_S);
            Self { entropy, permit, root_key, root, ca_key, ca, leaf_spki }
        }

        fn intermediate(
            entropy: &Entropy,
            permit: &ExemptPermit,
            (root, root_key): (&Certificate, &PrivateKey),
            key: &PrivateKey,
            seconds: i64,
        ) -> Certificate {
            let algorithm = root_key.signature_algorithm();
            let (spki, serial) = (key.spki_der(), entropy.serial());
            let tbs =
                profile::mastio_ca(root, names("acme Mastio CA"), spki, &serial, life(seconds), algorithm);
            root_key.sign_certificate(permit, tbs.unwrap()).unwrap()
        }

        fn leaf(&self, name: &str, seconds: i64) -> Certificate {
            let tbs = profile::agent_leaf(
                &self.ca,
                &format!("acme::{name}"),
                "acme",
                &format!("spiffe://cullis.local/acme/{name}"),
                &self.leaf_spki,
                &self.entropy.serial(),
                life(seconds),
                self.ca_key.signature_algorithm(),
            );
            self.ca_key.sign_certificate(&self.permit, tbs.unwrap()).unwrap()
        }

        /// The same leaf with a fresh serial.
        fn again(&self, leaf: &Certificate) -> Certificate {
            let algorithm = self.ca_key.signature_algorithm();
            let tbs = resign::complete_leaf(leaf, &self.ca, &self.entropy.serial(), algorithm);
            self.ca_key.sign_certificate(&self.permit, tbs.unwrap()).unwrap()
        }

        fn reissued(&self, seconds: i64) -> Certificate {
            let root = (&self.root, &self.root_key);
            Self::intermediate(&self.entropy, &self.permit, root, &self.ca_key, seconds)
        }

        fn expects(&self, mastio_ca: &Certificate, leaves: LeafRule) -> Expected {
            Expected {
                org_ca: self.root.clone(),
                mastio_ca: mastio_ca.clone(),
                replaced_org_ca: None,
                reissued: vec![],
                leaves,
            }
        }
    }

    fn judged(before: &Certificate, after: &Certificate, follows: &str, result: &Expected) -> String {
        let row = FleetRow {
            agent_id: "acme::bot".to_owned(),
            text: before.to_pem(),
            leaf: Some(before.clone()),
            issuer_key_id: String::new(),
        };
        let after = FleetAfter { text: after.to_pem() + follows, leaf: Some(after.clone()) };
        super::row(&row, &after, Some(result), NOW).map_or_else(|error| error.to_string(), |()| "good".into())
    }

    #[test]
    fn a_leaf_that_is_kept_is_kept_and_followed_by_the_intermediate_in_force() {
        let pki = Pki::new();
        let (leaf, new_ca) = (pki.leaf("bot", YEAR_S), pki.reissued(5 * YEAR_S));
        let expected = pki.expects(&new_ca, LeafRule::Kept);
        assert_eq!(judged(&leaf, &leaf, &new_ca.to_pem(), &expected), "good");
        let former = judged(&leaf, &leaf, &pki.ca.to_pem(), &expected);
        assert!(former.contains("the intermediate that follows it"), "{former}");
        let another = judged(&leaf, &pki.again(&leaf), &new_ca.to_pem(), &expected);
        assert!(another.contains("certificate, which must stay"), "{another}");
        // The certificate that is told and the one that would be stored.
        let row = FleetRow {
            agent_id: "acme::bot".to_owned(),
            text: leaf.to_pem(),
            leaf: Some(leaf.clone()),
            issuer_key_id: String::new(),
        };
        let text = pki.again(&leaf).to_pem() + &new_ca.to_pem();
        let after = FleetAfter { text, leaf: Some(leaf) };
        assert!(super::row(&row, &after, Some(&expected), NOW).is_err());
    }

    #[test]
    fn a_completed_leaf_keeps_what_it_had_and_lives_no_longer() {
        let pki = Pki::new();
        let leaf = pki.leaf("bot", YEAR_S);
        let expected = pki.expects(&pki.ca, LeafRule::Completed);
        let follows = pki.ca.to_pem();
        assert_eq!(judged(&leaf, &pki.again(&leaf), &follows, &expected), "good");
        let alone = judged(&leaf, &pki.again(&leaf), "", &expected);
        assert!(alone.contains("the leaf and the intermediate"), "{alone}");
        for (after, fault) in [
            (pki.leaf("other", YEAR_S), "subject"),
            (pki.leaf("bot", YEAR_S + 1), "validity"),
            (leaf.clone(), "serial"),
        ] {
            let found = judged(&leaf, &after, &follows, &expected);
            assert!(found.contains(fault), "{found}, expected {fault}");
        }
        let stranger = Pki { leaf_spki: pki.leaf_spki.clone(), ..Pki::new() };
        let found = judged(&leaf, &stranger.leaf("bot", YEAR_S), &follows, &expected);
        assert!(found != "good", "a leaf of another intermediate");
    }

    #[test]
    fn a_reissued_ca_keeps_name_key_and_life() {
        let pki = Pki::new();
        let judged = |after: &Certificate| {
            let mut expected = pki.expects(after, LeafRule::Kept);
            expected.reissued.push([pki.ca.clone(), after.clone()]);
            authority(&expected, NOW).map_or_else(|error| error.to_string(), |()| "good".into())
        };
        assert_eq!(judged(&pki.reissued(5 * YEAR_S)), "good");
        let longer = judged(&pki.reissued(5 * YEAR_S + 1));
        assert!(longer.contains("notAfter"), "{longer}");
        let same = judged(&pki.ca);
        assert!(same.contains("serial"), "{same}");
        let other_key = PrivateKey::generate_p256().unwrap().key;
        let root = (&pki.root, &pki.root_key);
        let other = Pki::intermediate(&pki.entropy, &pki.permit, root, &other_key, 5 * YEAR_S);
        let other = judged(&other);
        assert!(other.contains("public key"), "{other}");
    }

    #[test]
    fn a_tag_keeps_its_meaning_and_no_certificate_comes_with_it() {
        let judged = |before: &str, after: &str| {
            let row = FleetRow {
                agent_id: "acme::bot".to_owned(),
                text: before.to_owned(),
                leaf: None,
                issuer_key_id: String::new(),
            };
            super::row(&row, &FleetAfter { text: after.to_owned(), leaf: None }, None, NOW).is_ok()
        };
        assert!(judged("admin", "connector") && judged("spiffe", "spire"));
        for (before, after) in
            [("admin", "spire"), ("spiffe", "connector"), ("admin", "admin"), ("admin", "")]
        {
            assert!(!judged(before, after), "{before} to {after}");
        }
    }
}
