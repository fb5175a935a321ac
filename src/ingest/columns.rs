//! Columns of Arrow batches that come from outside, read by the types that we accept for them.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Int64Type, TimestampMicrosecondType, TimestampMillisecondType, TimestampNanosecondType,
    TimestampSecondType,
};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::{DataType, TimeUnit};
use bytes::Bytes;

use crate::types::EventTime;

/// A column of a type that can't be read as what it should be.
#[derive(Debug, thiserror::Error)]
#[error("column {name} is of type {found}")]
pub struct WrongType {
    pub name: String,
    pub found: DataType,
}

pub fn is_binary(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Binary | DataType::LargeBinary)
}

pub fn is_text(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Utf8 | DataType::LargeUtf8)
}

pub fn is_instant(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Int64 | DataType::Timestamp(_, _))
}

/// The column of that name, `None` if there is none.
pub fn column(
    batch: &RecordBatch,
    name: &str,
    fits: impl Fn(&DataType) -> bool,
) -> Result<Option<ArrayRef>, WrongType> {
    let Some(column) = batch.column_by_name(name) else {
        return Ok(None);
    };
    if fits(column.data_type()) {
        return Ok(Some(column.clone()));
    }
    Err(WrongType { name: name.to_owned(), found: column.data_type().clone() })
}

/// `None`: null.
pub fn text_at(column: &ArrayRef, index: usize) -> Option<String> {
    if column.is_null(index) {
        return None;
    }
    let text = match column.data_type() {
        DataType::LargeUtf8 => column.as_string::<i64>().value(index),
        _ => column.as_string::<i32>().value(index),
    };
    Some(text.to_owned())
}

/// A null gives no bytes.
pub fn binary_at(column: &ArrayRef, index: usize) -> Bytes {
    if column.is_null(index) {
        return Bytes::new();
    }
    Bytes::copy_from_slice(match column.data_type() {
        DataType::LargeBinary => column.as_binary::<i64>().value(index),
        _ => column.as_binary::<i32>().value(index),
    })
}

/// `None`: null. Milliseconds, rounded down where the column is finer.
pub fn instant_at(column: &ArrayRef, index: usize) -> Option<EventTime> {
    if column.is_null(index) {
        return None;
    }
    let ms = match column.data_type() {
        DataType::Timestamp(TimeUnit::Second, _) => {
            column.as_primitive::<TimestampSecondType>().value(index).saturating_mul(1000)
        }
        DataType::Timestamp(TimeUnit::Millisecond, _) => {
            column.as_primitive::<TimestampMillisecondType>().value(index)
        }
        DataType::Timestamp(TimeUnit::Microsecond, _) => {
            column.as_primitive::<TimestampMicrosecondType>().value(index).div_euclid(1000)
        }
        DataType::Timestamp(TimeUnit::Nanosecond, _) => {
            column.as_primitive::<TimestampNanosecondType>().value(index).div_euclid(1_000_000)
        }
        _ => column.as_primitive::<Int64Type>().value(index),
    };
    Some(EventTime(ms))
}
