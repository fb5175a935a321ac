//! Frames as Parquet: the form of segments and of probe sets.
//!
//! Owns the columns, their order and how they are encoded. Invariant: equal rows give equal bytes, so that
//! writing a segment again is idempotent under its name. Leaves to others: names, transactions, what it means.
//!
//! | column | type | |
//! |---|---|---|
//! | `image` | struct<bytes: binary, path: utf8> | the encoded image as it came; `path` is null |
//! | `stream_id` | utf8 | |
//! | `captured_at` | timestamp(ms, UTC) | |
//! | `label` | utf8, nullable | |
//! | `topic`, `partition`, `offset`, `row` | utf8, int32, int64, int32 | where the frame came from; `row` within its record |
//!
//! The file's `huggingface` metadata makes `datasets.load_dataset("parquet", ...)` decode `image`.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, Int64Type, TimestampMillisecondType};
use arrow_array::{
    Array, ArrayRef, BinaryArray, Int32Array, Int64Array, RecordBatch, StringArray, StructArray,
    TimestampMillisecondArray,
};
use arrow_schema::{ArrowError, DataType, Field, Fields, Schema, TimeUnit};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;

use crate::types::EventTime;

/// Rows of one record batch, written or read: what a reader holds in memory at a time.
const BATCH_ROWS: usize = 64;
/// Rows of one row group.
const ROW_GROUP_ROWS: usize = 1024;

/// How Hugging Face `datasets` types the columns.
const HUGGING_FACE: &str = r#"{"info":{"features":{"image":{"_type":"Image"},"stream_id":{"dtype":"string","_type":"Value"},"captured_at":{"dtype":"timestamp[ms, tz=UTC]","_type":"Value"},"label":{"dtype":"string","_type":"Value"},"topic":{"dtype":"string","_type":"Value"},"partition":{"dtype":"int32","_type":"Value"},"offset":{"dtype":"int64","_type":"Value"},"row":{"dtype":"int32","_type":"Value"}}}}"#;

#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    #[error("a segment could not be encoded or decoded: {0}")]
    Parquet(#[from] ParquetError),
    #[error("a segment's columns do not fit: {0}")]
    Arrow(#[from] ArrowError),
    #[error("a segment has no column {name} of type {expected}")]
    Column { name: &'static str, expected: &'static str },
}

/// One frame and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub image: Bytes,
    pub stream_id: String,
    pub captured_at: EventTime,
    pub label: Option<String>,
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    pub row: i32,
}

/// Encodes rows in the given order. Deterministic.
pub fn write(rows: &[Row]) -> Result<Bytes, SegmentError> {
    let schema = schema();
    let mut writer = ArrowWriter::try_new(Vec::new(), schema.clone(), Some(properties()))?;
    for rows in rows.chunks(BATCH_ROWS) {
        writer.write(&batch(&schema, rows)?)?;
    }
    Ok(writer.into_inner()?.into())
}

fn image_fields() -> Fields {
    Fields::from(vec![Field::new("bytes", DataType::Binary, true), Field::new("path", DataType::Utf8, true)])
}

fn schema() -> Arc<Schema> {
    let instant = DataType::Timestamp(TimeUnit::Millisecond, Some("UTC".into()));
    let fields = vec![
        // Never null; but `datasets` takes the declared feature only for a column that may be.
        Field::new("image", DataType::Struct(image_fields()), true),
        Field::new("stream_id", DataType::Utf8, false),
        Field::new("captured_at", instant, false),
        Field::new("label", DataType::Utf8, true),
        Field::new("topic", DataType::Utf8, false),
        Field::new("partition", DataType::Int32, false),
        Field::new("offset", DataType::Int64, false),
        Field::new("row", DataType::Int32, false),
    ];
    // One key alone: a map of several would be written in any order.
    let metadata = HashMap::from([("huggingface".to_owned(), HUGGING_FACE.to_owned())]);
    Arc::new(Schema::new_with_metadata(fields, metadata))
}

fn properties() -> WriterProperties {
    let image_bytes = ColumnPath::from(vec!["image".to_owned(), "bytes".to_owned()]);
    WriterProperties::builder()
        // Not the library's version: an update must not change the bytes by its name alone.
        .set_created_by("palimpsest".to_owned())
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .set_compression(Compression::SNAPPY)
        // Encoded images don't compress, and their smallest and largest bytes tell nothing.
        .set_column_compression(image_bytes.clone(), Compression::UNCOMPRESSED)
        .set_column_dictionary_enabled(image_bytes.clone(), false)
        .set_column_statistics_enabled(image_bytes, EnabledStatistics::None)
        .build()
}

fn batch(schema: &Arc<Schema>, rows: &[Row]) -> Result<RecordBatch, SegmentError> {
    let images = BinaryArray::from_iter_values(rows.iter().map(|row| &row.image));
    let paths = StringArray::new_null(rows.len());
    let image = StructArray::try_new(image_fields(), vec![Arc::new(images), Arc::new(paths)], None)?;
    let instants = rows.iter().map(|row| row.captured_at.as_ms());
    let columns: Vec<ArrayRef> = vec![
        Arc::new(image),
        Arc::new(StringArray::from_iter_values(rows.iter().map(|row| &row.stream_id))),
        Arc::new(TimestampMillisecondArray::from_iter_values(instants).with_timezone("UTC")),
        Arc::new(StringArray::from_iter(rows.iter().map(|row| row.label.as_deref()))),
        Arc::new(StringArray::from_iter_values(rows.iter().map(|row| &row.topic))),
        Arc::new(Int32Array::from_iter_values(rows.iter().map(|row| row.partition))),
        Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.offset))),
        Arc::new(Int32Array::from_iter_values(rows.iter().map(|row| row.row))),
    ];
    Ok(RecordBatch::try_new(schema.clone(), columns)?)
}

/// Reads a segment row by row, in the order in which it was written.
pub fn read(bytes: Bytes) -> Result<Rows, SegmentError> {
    let batches = ParquetRecordBatchReaderBuilder::try_new(bytes)?.with_batch_size(BATCH_ROWS).build()?;
    Ok(Rows { batches, rows: Vec::new().into_iter() })
}

/// The rows of a segment; holds one batch of them at a time. After an error it ends.
pub struct Rows {
    batches: ParquetRecordBatchReader,
    rows: std::vec::IntoIter<Row>,
}

impl Iterator for Rows {
    type Item = Result<Row, SegmentError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.rows.next() {
                return Some(Ok(row));
            }
            let rows = match self.batches.next()? {
                Ok(batch) => decode_batch(&batch),
                Err(error) => Err(error.into()),
            };
            match rows {
                Ok(rows) => self.rows = rows.into_iter(),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

fn decode_batch(batch: &RecordBatch) -> Result<Vec<Row>, SegmentError> {
    let image = column(batch, "image", "struct", |c| c.as_struct_opt())?;
    let images = image
        .column_by_name("bytes")
        .and_then(|c| c.as_binary_opt::<i32>())
        .ok_or(SegmentError::Column { name: "image.bytes", expected: "binary" })?;
    let text = |name| column(batch, name, "utf8", |c| c.as_string_opt::<i32>());
    let (stream_id, label, topic) = (text("stream_id")?, text("label")?, text("topic")?);
    let captured_at =
        column(batch, "captured_at", "timestamp(ms)", |c| c.as_primitive_opt::<TimestampMillisecondType>())?;
    let int32 = |name| column(batch, name, "int32", |c| c.as_primitive_opt::<Int32Type>());
    let (partition, row) = (int32("partition")?, int32("row")?);
    let offset = column(batch, "offset", "int64", |c| c.as_primitive_opt::<Int64Type>())?;
    let rows = (0..batch.num_rows()).map(|i| Row {
        image: Bytes::copy_from_slice(images.value(i)),
        stream_id: stream_id.value(i).to_owned(),
        captured_at: EventTime(captured_at.value(i)),
        label: label.is_valid(i).then(|| label.value(i).to_owned()),
        topic: topic.value(i).to_owned(),
        partition: partition.value(i),
        offset: offset.value(i),
        row: row.value(i),
    });
    Ok(rows.collect())
}

fn column<'a, T>(
    batch: &'a RecordBatch,
    name: &'static str,
    expected: &'static str,
    cast: impl Fn(&'a ArrayRef) -> Option<&'a T>,
) -> Result<&'a T, SegmentError> {
    batch.column_by_name(name).and_then(cast).ok_or(SegmentError::Column { name, expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(count: usize) -> Vec<Row> {
        (0..count)
            .map(|i| Row {
                image: vec![i as u8; 100 + i].into(),
                stream_id: format!("stream-{}", i % 3),
                captured_at: EventTime(1_769_817_600_000 + i as i64),
                label: (i % 4 > 0).then(|| format!("MAP{i:02}")),
                topic: "frames".into(),
                partition: 3,
                offset: i as i64 / 2,
                row: (i % 2) as i32,
            })
            .collect()
    }

    #[test]
    fn rows_read_back_in_order() {
        let rows = rows(200);
        let found: Vec<Row> = read(write(&rows).unwrap()).unwrap().collect::<Result<_, _>>().unwrap();
        assert_eq!(found, rows);
    }

    #[test]
    fn equal_rows_give_equal_bytes() {
        assert_eq!(write(&rows(100)).unwrap(), write(&rows(100)).unwrap());
        assert_ne!(write(&rows(100)).unwrap(), write(&rows(99)).unwrap());
    }

    #[test]
    fn a_cut_file_is_an_error_and_not_an_empty_one() {
        let bytes = write(&rows(10)).unwrap();
        assert!(read(bytes.slice(..bytes.len() - 1)).is_err());
    }
}
