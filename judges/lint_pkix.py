"""Lints certificates and CRLs with pkilint's RFC 5280 set.

    lint_pkix.py PEM_FILE...

The validators are those of `lint_pkix_cert` and `lint_crl --profile PKIX`, run in
one process, because starting Python costs more than linting. Every finding of
NOTICE or above is one JSON line on stdout. Exit 1 if there is one, 2 if a file
holds nothing to lint.

Two findings are pkilint's own limits, not RFC 5280's, and are judged again here:
its URI syntax knows a fixed list of schemes without `spiffe`, and its host names
need a dot, where RFC 1034 §3.5 allows a single label such as `localhost`.
"""

import json
import re
import sys

import validators
from pkilint import loader, pkix
from pkilint.pkix import certificate, crl, extension, name
from pkilint.validation import ValidationFindingSeverity

PEM = re.compile(r"-----BEGIN (CERTIFICATE|X509 CRL)-----.*?-----END \1-----", re.DOTALL)


def certificate_validator():
    return certificate.create_pkix_certificate_validator_container(
        certificate.create_decoding_validators(name.ATTRIBUTE_TYPE_MAPPINGS, extension.EXTENSION_MAPPINGS),
        [
            certificate.create_issuer_validator_container([]),
            certificate.create_validity_validator_container(),
            certificate.create_subject_validator_container([]),
            certificate.create_extensions_validator_container([]),
            certificate.create_spki_validator_container([]),
        ],
    )


def crl_validator():
    return crl.create_pkix_crl_validator_container(
        [
            pkix.create_attribute_decoder(name.ATTRIBUTE_TYPE_MAPPINGS),
            pkix.create_extension_decoder(extension.EXTENSION_MAPPINGS),
        ],
        [
            crl.create_issuer_validator_container([]),
            crl.create_validity_validator_container([]),
            crl.create_extensions_validator_container([]),
        ],
    )


KINDS = {
    "CERTIFICATE": (loader.RFC5280CertificateDocumentLoader(), certificate_validator()),
    "X509 CRL": (loader.RFC5280CertificateListDocumentLoader(), crl_validator()),
}


LABEL = re.compile(r"[A-Za-z]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def is_allowed_after_all(code, value):
    if code == "pkix.invalid_uri_syntax" and value.startswith("spiffe://"):
        # The same library judges the same text under a scheme that it knows.
        return validators.url("https" + value.removeprefix("spiffe"), simple_host=True) is True
    if code == "pkix.invalid_domain_name_syntax":
        return LABEL.fullmatch(value) is not None
    return False


def findings(kind, pem, label):
    load, validator = KINDS[kind]
    try:
        document = load.load_pem_document(pem, label)
    except ValueError as error:
        yield {"severity": "FATAL", "code": "unreadable", "message": str(error)}
        return
    for result in validator.validate(document.root):
        for description in result.finding_descriptions:
            # In pkilint the graver severity is the smaller number.
            if description.finding.severity > ValidationFindingSeverity.NOTICE:
                continue
            if not is_allowed_after_all(description.finding.code, str(result.node.pdu)):
                yield {
                    "severity": description.finding.severity.name,
                    "code": description.finding.code,
                    "message": description.message,
                    "validator": str(result.validator),
                    "node": result.node.path,
                }


def main(paths):
    linted = found = 0
    for path in paths:
        with open(path, encoding="ascii", errors="replace") as file:
            blocks = list(PEM.finditer(file.read()))
        if not blocks:
            print(f"{path}: no certificate and no CRL", file=sys.stderr)
            return 2
        for number, block in enumerate(blocks):
            linted += 1
            for finding in findings(block.group(1), block.group(0), path):
                found += 1
                print(json.dumps({"file": path, "index": number, **finding}))
    print(f"linted {linted}, findings {found}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        raise SystemExit(2)
    raise SystemExit(main(sys.argv[1:]))
