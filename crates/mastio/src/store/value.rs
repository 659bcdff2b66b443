//! What statements take and give: text and whole numbers, and nothing else.
//!
//! Two types are enough for every table, and both databases agree on them.

use super::StoreError;

/// A parameter of a statement. PostgreSQL types its NULLs, so there is one for each type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// TEXT, or NULL of that type.
    Text(Option<String>),
    /// BIGINT, or NULL of that type.
    Integer(Option<i64>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(Some(text.to_owned()))
    }
}
impl From<&String> for Value {
    fn from(text: &String) -> Self {
        Self::Text(Some(text.clone()))
    }
}
impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(Some(text))
    }
}
impl From<Option<String>> for Value {
    fn from(text: Option<String>) -> Self {
        Self::Text(text)
    }
}
impl From<Option<&str>> for Value {
    fn from(text: Option<&str>) -> Self {
        Self::Text(text.map(str::to_owned))
    }
}
impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Self::Integer(Some(number))
    }
}
impl From<Option<i64>> for Value {
    fn from(number: Option<i64>) -> Self {
        Self::Integer(number)
    }
}
impl From<bool> for Value {
    fn from(truth: bool) -> Self {
        Self::Integer(Some(i64::from(truth)))
    }
}

/// One row of an answer, its cells in the order of the SELECT list.
#[derive(Debug, Clone)]
pub struct Row(pub(super) Vec<Cell>);

/// One cell of a [`Row`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cell {
    Null,
    Text(String),
    Integer(i64),
}

impl Row {
    fn cell(&self, index: usize) -> Result<&Cell, StoreError> {
        self.0.get(index).ok_or(StoreError::Shape { index, expected: "a column" })
    }

    /// The text at `index`. Errors: [`StoreError::Shape`] when it is NULL or a number.
    pub fn text(&self, index: usize) -> Result<String, StoreError> {
        self.optional_text(index)?.ok_or(StoreError::Shape { index, expected: "text that is not NULL" })
    }

    /// The text at `index`, absent when NULL. Errors: [`StoreError::Shape`] when it is a number.
    pub fn optional_text(&self, index: usize) -> Result<Option<String>, StoreError> {
        match self.cell(index)? {
            Cell::Null => Ok(None),
            Cell::Text(text) => Ok(Some(text.clone())),
            Cell::Integer(_) => Err(StoreError::Shape { index, expected: "text" }),
        }
    }

    /// The number at `index`. Errors: [`StoreError::Shape`] when it is NULL or text.
    pub fn integer(&self, index: usize) -> Result<i64, StoreError> {
        self.optional_integer(index)?
            .ok_or(StoreError::Shape { index, expected: "a number that is not NULL" })
    }

    /// The number at `index`, absent when NULL. Errors: [`StoreError::Shape`] when it is text.
    pub fn optional_integer(&self, index: usize) -> Result<Option<i64>, StoreError> {
        match self.cell(index)? {
            Cell::Null => Ok(None),
            Cell::Integer(number) => Ok(Some(*number)),
            Cell::Text(_) => Err(StoreError::Shape { index, expected: "a number" }),
        }
    }

    /// Whether the number at `index` is other than zero. Errors: as [`Row::integer`].
    pub fn truth(&self, index: usize) -> Result<bool, StoreError> {
        Ok(self.integer(index)? != 0)
    }
}

/// Builds the parameters of a statement: `values![agent_id, now, None::<String>]`.
#[macro_export]
macro_rules! values {
    ($($value:expr),* $(,)?) => { &[$($crate::store::Value::from($value)),*][..] };
}
