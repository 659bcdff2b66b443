//! The arguments of a call, read for those who decide about it. What they see is what the server gets.

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::{ARGUMENTS_BYTES_MAX, GatewayError, jsonrpc};

/// Reads arguments within their bounds. An object that names a member twice is refused: we would judge one of the two,
/// and the server could take the other.
///
/// Errors: [`GatewayError::ArgumentsTooLarge`], [`GatewayError::Arguments`].
pub(super) fn read(raw: &RawValue) -> Result<Value, GatewayError> {
    // Without its whitespace a text is no longer than with it.
    if raw.get().len() > ARGUMENTS_BYTES_MAX {
        let found = jsonrpc::compact_bytes(raw.get());
        if found > ARGUMENTS_BYTES_MAX {
            return Err(GatewayError::ArgumentsTooLarge { found, bytes_max: ARGUMENTS_BYTES_MAX });
        }
    }
    let Once(value) = serde_json::from_str(raw.get())
        .map_err(|error| GatewayError::Arguments(jsonrpc::shorten(&error.to_string(), 512).to_owned()))?;
    Ok(value)
}

/// A JSON value whose objects name each member once.
struct Once(Value);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OnceVisitor).map(Self)
    }
}

struct OnceVisitor;

impl<'de> Visitor<'de> for OnceVisitor {
    type Value = Value;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut read = Vec::new();
        while let Some(Once(item)) = items.next_element()? {
            read.push(item);
        }
        Ok(Value::Array(read))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut read = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            let Once(value) = members.next_value()?;
            if read.contains_key(&name) {
                return Err(A::Error::custom(format!("the member {name:?} is named twice")));
            }
            read.insert(name, value);
        }
        Ok(Value::Object(read))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn arguments_that_could_be_read_in_two_ways_are_refused() {
        let arguments = |text: &str| read(&RawValue::from_string(text.to_owned()).unwrap());
        let text = r#"{"a":[1,-2,0.5,1e300,true,null,"é"],"b":{"a":18446744073709551615}}"#;
        assert_eq!(arguments(text).unwrap(), serde_json::from_str::<Value>(text).unwrap());
        for twice in [r#"{"a":1,"a":2}"#, r#"{"b":[{"a":1,"\u0061":2}]}"#] {
            let refused = arguments(twice).unwrap_err().to_string();
            assert!(refused.contains("named twice"), "{refused}");
        }
        assert!(arguments(r#"{"a":{"a":1},"b":{"a":1}}"#).is_ok());
    }
}
