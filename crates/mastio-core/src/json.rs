//! JSON read strictly and written canonically.
//!
//! Signed and hashed JSON must mean one thing to every reader. So [`parse`] refuses what two parsers may
//! read differently (a member named twice), and [`canonical`] writes each value in exactly one way.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// The largest integer [`canonical`] writes, and the negative of the smallest: 2^53 − 1.
///
/// Source: RFC 7493 §2.2, which RFC 8785 §3.1 builds on.
pub const INTEGER_MAX: i64 = (1 << 53) - 1;

/// Why JSON was not read or not written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// A number has a fraction or an exponent. We never write one.
    #[error("json number is no integer")]
    Float,
    /// An integer lies outside ±[`INTEGER_MAX`].
    #[error("json integer is outside ±(2^53 - 1)")]
    IntegerRange,
    /// A value that must be an object is something else.
    #[error("json value is no object")]
    NotAnObject,
    /// The text is not JSON, or has bytes after the value.
    #[error("text is not json")]
    Syntax,
    /// An object names one member twice.
    #[error("json object names a member twice")]
    DuplicateMember,
}

impl JsonError {
    /// The stable name of this refusal, for logs and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Float => "json_float",
            Self::IntegerRange => "json_integer_range",
            Self::NotAnObject => "json_not_an_object",
            Self::Syntax => "json_syntax",
            Self::DuplicateMember => "json_duplicate_member",
        }
    }
}

/// Writes a value in the one canonical form.
///
/// Shape: no white space; object members sorted by the UTF-16 code units of their names.
/// Errors: [`JsonError::Float`] for any number that is no integer, even `1.0`;
/// [`JsonError::IntegerRange`] outside ±[`INTEGER_MAX`].
/// Source: RFC 8785 §3.2.
pub fn canonical(value: &Value) -> Result<String, JsonError> {
    let mut text = String::new();
    write_value(&mut text, value)?;
    Ok(text)
}

/// Reads one JSON value from bytes that hold nothing else.
///
/// Errors: [`JsonError::DuplicateMember`] at any depth; [`JsonError::Syntax`] for anything else that is
/// wrong, including bytes after the value and nesting deeper than 128.
/// Source: RFC 8259; RFC 7515 §4 and RFC 7519 §4 allow refusing duplicate names.
pub fn parse(bytes: &[u8]) -> Result<Value, JsonError> {
    match serde_json::from_slice::<UniqueMembers>(bytes) {
        Ok(UniqueMembers(value)) => Ok(value),
        // Only our visitor raises a data error: `Value` itself accepts every type.
        Err(error) if error.is_data() => Err(JsonError::DuplicateMember),
        Err(_) => Err(JsonError::Syntax),
    }
}

/// Writes one string with its quotes, as RFC 8785 §3.2.2.2 says.
pub(crate) fn write_string(text: &mut String, string: &str) {
    const HEX: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    text.push('"');
    for character in string.chars() {
        match character {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\u{8}' => text.push_str("\\b"),
            '\t' => text.push_str("\\t"),
            '\n' => text.push_str("\\n"),
            '\u{c}' => text.push_str("\\f"),
            '\r' => text.push_str("\\r"),
            control if control < ' ' => {
                let code = control as usize;
                text.push_str("\\u00");
                text.push(HEX[code >> 4]);
                text.push(HEX[code & 15]);
            }
            other => text.push(other),
        }
    }
    text.push('"');
}

fn write_value(text: &mut String, value: &Value) -> Result<(), JsonError> {
    match value {
        Value::Null => text.push_str("null"),
        Value::Bool(true) => text.push_str("true"),
        Value::Bool(false) => text.push_str("false"),
        Value::Number(number) => text.push_str(&integer(number)?.to_string()),
        Value::String(string) => write_string(text, string),
        Value::Array(items) => {
            text.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                write_value(text, item)?;
            }
            text.push(']');
        }
        Value::Object(members) => {
            let mut members: Vec<(&String, &Value)> = members.iter().collect();
            // UTF-8 order differs from UTF-16 order above the basic plane, so `Map`'s order will not do.
            members.sort_by(|(left, _), (right, _)| left.encode_utf16().cmp(right.encode_utf16()));
            text.push('{');
            for (index, (name, member)) in members.into_iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                write_string(text, name);
                text.push(':');
                write_value(text, member)?;
            }
            text.push('}');
        }
    }
    Ok(())
}

fn integer(number: &Number) -> Result<i64, JsonError> {
    if number.is_f64() {
        return Err(JsonError::Float);
    }
    number
        .as_i64()
        .filter(|integer| (-INTEGER_MAX..=INTEGER_MAX).contains(integer))
        .ok_or(JsonError::IntegerRange)
}

/// A [`Value`] in which no object named a member twice.
struct UniqueMembers(Value);

impl<'de> Deserialize<'de> for UniqueMembers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueMembersVisitor).map(Self)
    }
}

struct UniqueMembersVisitor;

impl<'de> Visitor<'de> for UniqueMembersVisitor {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(UniqueMembers(item)) = sequence.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some((name, UniqueMembers(member))) = access.next_entry::<String, UniqueMembers>()? {
            if members.insert(name, member).is_some() {
                return Err(de::Error::custom("duplicate member"));
            }
        }
        Ok(Value::Object(members))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn the_strings_and_literals_of_rfc_8785_section_3_2_2_are_written_as_printed_there() {
        let value = parse(
            br#"{"string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/", "literals": [null, true, false]}"#,
        )
        .unwrap();
        assert_eq!(
            canonical(&value).unwrap(),
            r#"{"literals":[null,true,false],"string":"€$\u000f\nA'B\"\\\\\"/"}"#
        );
    }

    #[test]
    fn the_members_of_rfc_8785_section_3_2_3_are_sorted_as_printed_there() {
        let value = parse(
            br#"{"\u20ac": "Euro Sign", "\r": "Carriage Return", "\ufb33": "Hebrew Letter Dalet With Dagesh",
                "1": "One", "\ud83d\ude00": "Emoji: Grinning Face", "\u0080": "Control", "\u00f6": "Latin Small Letter O With Diaeresis"}"#,
        )
        .unwrap();
        assert_eq!(
            canonical(&value).unwrap(),
            "{\"\\r\":\"Carriage Return\",\"1\":\"One\",\"\u{80}\":\"Control\",\
             \"ö\":\"Latin Small Letter O With Diaeresis\",\"€\":\"Euro Sign\",\"😀\":\"Emoji: Grinning Face\",\
             \"\u{fb33}\":\"Hebrew Letter Dalet With Dagesh\"}"
        );
    }

    #[test]
    fn numbers_are_integers_inside_the_exact_range_of_a_double() {
        for good in [0, 1, -1, INTEGER_MAX - 1, INTEGER_MAX, -INTEGER_MAX] {
            assert_eq!(canonical(&json!(good)).unwrap(), good.to_string());
        }
        for (name, bad, error) in [
            ("one above", json!(INTEGER_MAX + 1), JsonError::IntegerRange),
            ("one below", json!(-INTEGER_MAX - 1), JsonError::IntegerRange),
            ("unsigned", json!(u64::MAX), JsonError::IntegerRange),
            ("fraction", json!(1.5), JsonError::Float),
            ("whole float", json!(1.0), JsonError::Float),
            ("nested", json!({"a": [{"b": 0.1}]}), JsonError::Float),
        ] {
            assert_eq!(canonical(&bad), Err(error), "{name}");
        }
    }

    #[test]
    fn text_with_two_meanings_or_none_is_refused() {
        for (name, text, error) in [
            ("twice at the top", r#"{"a":1,"a":1}"#, JsonError::DuplicateMember),
            ("twice by escape", r#"{"a":1,"\u0061":2}"#, JsonError::DuplicateMember),
            ("twice inside", r#"[{"b":{"a":1,"a":2}}]"#, JsonError::DuplicateMember),
            ("after the value", r#"{} {}"#, JsonError::Syntax),
            ("comma", r#"{"a":1,}"#, JsonError::Syntax),
            ("byte order mark", "\u{feff}{}", JsonError::Syntax),
            ("lone surrogate", r#""\ud800""#, JsonError::Syntax),
            ("empty", "", JsonError::Syntax),
            ("deep", &"[".repeat(200), JsonError::Syntax),
        ] {
            assert_eq!(parse(text.as_bytes()), Err(error), "{name}");
        }
        assert_eq!(
            parse(br#" {"a":[1,-2,"x",null,true,1.5]} "#).unwrap(),
            json!({"a": [1, -2, "x", null, true, 1.5]})
        );
    }

    proptest! {
        #[test]
        fn reading_what_was_written_gives_the_same_text(names in proptest::collection::vec(".*", 0..6), number in -INTEGER_MAX..=INTEGER_MAX) {
            let members: Map<String, Value> = names.iter().map(|name| (name.clone(), json!([name, number]))).collect();
            let text = canonical(&Value::Object(members)).unwrap();
            prop_assert_eq!(canonical(&parse(text.as_bytes()).unwrap()).unwrap(), text);
        }

        #[test]
        fn random_bytes_never_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
