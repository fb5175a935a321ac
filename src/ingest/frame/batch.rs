//! A batch record: an Arrow IPC stream with one row a frame.
//!
//! Owns: reading the stream and its columns. Invariant: the whole stream is read before any row is taken, so a
//! stream that breaks gives no frames. The push decoder is used because it never allocates what a broken
//! length field claims.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Int64Type, TimestampMicrosecondType, TimestampMillisecondType, TimestampNanosecondType,
    TimestampSecondType,
};
use arrow_array::{Array, ArrayRef, RecordBatch, UInt8Array};
use arrow_ipc::reader::StreamDecoder;
use arrow_schema::{ArrowError, DataType, TimeUnit};
use bytes::Bytes;

use super::{CAPTURED_AT, Context, Decoded, FRAME, Fields, LABEL, Reject, RejectReason, STREAM_ID};
use crate::types::EventTime;

pub(super) fn decode(context: &Context<'_>, value: &Bytes) -> Result<Decoded, Reject> {
    let batches =
        read(value).map_err(|error| Reject::record(RejectReason::BrokenArrowStream, error.to_string()))?;
    let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
    let max = context.limits.max_rows;
    if rows > max {
        return Err(Reject::record(
            RejectReason::TooManyRows,
            format!("the batch has {rows} rows, more than {max}"),
        ));
    }
    let mut decoded = Decoded::default();
    let mut row = 0;
    for batch in &batches {
        let columns = Columns::of(batch)?;
        for index in 0..batch.num_rows() {
            match columns.frame(context, index, row) {
                Ok(frame) => decoded.frames.push(frame),
                Err(reject) => decoded.rejects.push(reject.at_row(row)),
            }
            row += 1;
        }
    }
    if row == 0 {
        return Err(Reject::record(RejectReason::EmptyValue, "the batch has no rows"));
    }
    Ok(decoded)
}

fn read(value: &Bytes) -> Result<Vec<RecordBatch>, ArrowError> {
    let mut buffer = UInt8Array::from(value.to_vec()).into_parts().1.into_inner();
    let mut decoder = StreamDecoder::new();
    let mut batches = Vec::new();
    while !buffer.is_empty() {
        let Some(batch) = decoder.decode(&mut buffer)? else {
            break;
        };
        batches.push(batch);
    }
    decoder.finish()?;
    if decoder.schema().is_none() {
        return Err(ArrowError::IpcError("the stream has no schema".into()));
    }
    Ok(batches)
}

/// The columns of one batch, their types checked.
struct Columns {
    frame: ArrayRef,
    stream_id: Option<ArrayRef>,
    captured_at: Option<ArrayRef>,
    label: Option<ArrayRef>,
}

impl Columns {
    fn of(batch: &RecordBatch) -> Result<Self, Reject> {
        let binary = |t: &DataType| matches!(t, DataType::Binary | DataType::LargeBinary);
        let text = |t: &DataType| matches!(t, DataType::Utf8 | DataType::LargeUtf8);
        let instant = |t: &DataType| matches!(t, DataType::Int64 | DataType::Timestamp(_, _));
        let frame = column(batch, FRAME, binary)?
            .ok_or_else(|| Reject::record(RejectReason::BadColumn, "the batch has no column frame"))?;
        Ok(Self {
            frame,
            stream_id: column(batch, STREAM_ID, text)?,
            captured_at: column(batch, CAPTURED_AT, instant)?,
            label: column(batch, LABEL, text)?,
        })
    }

    fn frame(&self, context: &Context<'_>, index: usize, row: u32) -> Result<super::Frame, Reject> {
        context.frame(Fields {
            row,
            stream_id: self.stream_id.as_ref().and_then(|c| text_at(c, index)),
            captured_at: self.captured_at.as_ref().and_then(|c| instant_at(c, index)),
            label: self.label.as_ref().and_then(|c| text_at(c, index)),
            image: binary_at(&self.frame, index),
            format: None,
        })
    }
}

fn column(
    batch: &RecordBatch,
    name: &str,
    fits: impl Fn(&DataType) -> bool,
) -> Result<Option<ArrayRef>, Reject> {
    let Some(column) = batch.column_by_name(name) else {
        return Ok(None);
    };
    if fits(column.data_type()) {
        return Ok(Some(column.clone()));
    }
    let found = column.data_type();
    Err(Reject::record(RejectReason::BadColumn, format!("column {name} is of type {found}")))
}

fn text_at(column: &ArrayRef, index: usize) -> Option<String> {
    if column.is_null(index) {
        return None;
    }
    let text = match column.data_type() {
        DataType::LargeUtf8 => column.as_string::<i64>().value(index),
        _ => column.as_string::<i32>().value(index),
    };
    Some(text.to_owned())
}

/// A null gives no bytes, which the check of the image refuses.
fn binary_at(column: &ArrayRef, index: usize) -> Bytes {
    if column.is_null(index) {
        return Bytes::new();
    }
    Bytes::copy_from_slice(match column.data_type() {
        DataType::LargeBinary => column.as_binary::<i64>().value(index),
        _ => column.as_binary::<i32>().value(index),
    })
}

/// Milliseconds, rounded down where the column is finer.
fn instant_at(column: &ArrayRef, index: usize) -> Option<EventTime> {
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
