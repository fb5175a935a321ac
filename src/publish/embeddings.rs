//! `embeddings/*.parquet`: one row a frame, with the frame's identity and its embedding.
//!
//! | column | type |
//! |---|---|
//! | `stream_id` | utf8 |
//! | `captured_at` | timestamp in ms, UTC |
//! | `topic` | utf8 |
//! | `partition` | int32 |
//! | `offset` | int64 |
//! | `row` | int32: place within a record that was a batch |
//! | `embedding` | fixed-size list of float32, not null |
//!
//! Equal rows give equal bytes with one version of this program. Nothing here does I/O.

use std::sync::Arc;

use arrow_array::{
    ArrayRef, FixedSizeListArray, Float32Array, Int32Array, Int64Array, RecordBatch, StringArray,
    TimestampMillisecondArray,
};
use arrow_schema::{ArrowError, DataType, Field, FieldRef, Schema, SchemaRef, TimeUnit};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::schema::types::ColumnPath;

use crate::types::EventTime;

/// Rows of a row group: what a reader that wants a few rows must read at least. Larger groups compress the
/// identities better, smaller ones make ranges of rows cheaper to fetch.
const ROW_GROUP_ROWS: usize = 8192;

#[derive(Debug, thiserror::Error)]
pub enum EmbeddingsError {
    #[error("row {row} has an embedding of {found} values, not {dim}")]
    Dimension { row: usize, found: usize, dim: usize },
    #[error("embeddings can't be encoded: {0}")]
    Arrow(#[from] ArrowError),
    #[error("embeddings can't be written: {0}")]
    Parquet(#[from] ParquetError),
}

/// One frame's embedding and where the frame came from.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingRow {
    pub stream_id: String,
    pub captured_at: EventTime,
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    pub row: i32,
    pub embedding: Vec<f32>,
}

/// The bytes of one Parquet file. `dim` is given because a file may have no rows.
pub fn write(rows: &[EmbeddingRow], dim: usize) -> Result<Bytes, EmbeddingsError> {
    for (row, EmbeddingRow { embedding, .. }) in rows.iter().enumerate() {
        if embedding.len() != dim {
            return Err(EmbeddingsError::Dimension { row, found: embedding.len(), dim });
        }
    }
    let schema = schema(dim);
    let mut writer = ArrowWriter::try_new(Vec::new(), schema.clone(), Some(properties()))?;
    for rows in rows.chunks(ROW_GROUP_ROWS) {
        writer.write(&batch(&schema, rows, dim)?)?;
    }
    Ok(Bytes::from(writer.into_inner()?))
}

fn item() -> FieldRef {
    Arc::new(Field::new_list_field(DataType::Float32, false))
}

fn schema(dim: usize) -> SchemaRef {
    let field = |name: &str, data_type| Field::new(name, data_type, false);
    Arc::new(Schema::new(vec![
        field("stream_id", DataType::Utf8),
        field("captured_at", DataType::Timestamp(TimeUnit::Millisecond, Some("UTC".into()))),
        field("topic", DataType::Utf8),
        field("partition", DataType::Int32),
        field("offset", DataType::Int64),
        field("row", DataType::Int32),
        field("embedding", DataType::FixedSizeList(item(), dim as i32)),
    ]))
}

/// Embeddings are noise to a dictionary and to a compressor; the rest repeats.
fn properties() -> WriterProperties {
    let values = ColumnPath::from(vec!["embedding".to_owned(), "list".to_owned(), "item".to_owned()]);
    WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .set_column_dictionary_enabled(values.clone(), false)
        .set_column_compression(values, Compression::UNCOMPRESSED)
        .build()
}

fn batch(schema: &SchemaRef, rows: &[EmbeddingRow], dim: usize) -> Result<RecordBatch, ArrowError> {
    let values = Float32Array::from_iter_values(rows.iter().flat_map(|row| row.embedding.iter().copied()));
    let times = TimestampMillisecondArray::from_iter_values(rows.iter().map(|row| row.captured_at.as_ms()));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(rows.iter().map(|row| &row.stream_id))),
        Arc::new(times.with_timezone("UTC")),
        Arc::new(StringArray::from_iter_values(rows.iter().map(|row| &row.topic))),
        Arc::new(Int32Array::from_iter_values(rows.iter().map(|row| row.partition))),
        Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.offset))),
        Arc::new(Int32Array::from_iter_values(rows.iter().map(|row| row.row))),
        Arc::new(FixedSizeListArray::try_new(item(), dim as i32, Arc::new(values), None)?),
    ];
    RecordBatch::try_new(schema.clone(), columns)
}

#[cfg(test)]
mod tests {
    use arrow_array::cast::AsArray;
    use arrow_array::types::{Float32Type, Int32Type, Int64Type, TimestampMillisecondType};
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    use super::*;

    /// All rows of a file, in order.
    fn read(bytes: Bytes) -> Vec<EmbeddingRow> {
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap().build().unwrap();
        reader.flat_map(|batch| read_batch(&batch.unwrap())).collect()
    }

    fn read_batch(batch: &RecordBatch) -> Vec<EmbeddingRow> {
        let column = |name| batch.column_by_name(name).unwrap();
        let text = |name, i| column(name).as_string::<i32>().value(i).to_owned();
        let int = |name, i| column(name).as_primitive::<Int32Type>().value(i);
        let row = |i| EmbeddingRow {
            stream_id: text("stream_id", i),
            captured_at: EventTime(column("captured_at").as_primitive::<TimestampMillisecondType>().value(i)),
            topic: text("topic", i),
            partition: int("partition", i),
            offset: column("offset").as_primitive::<Int64Type>().value(i),
            row: int("row", i),
            embedding: column("embedding")
                .as_fixed_size_list()
                .value(i)
                .as_primitive::<Float32Type>()
                .values()
                .to_vec(),
        };
        (0..batch.num_rows()).map(row).collect()
    }

    fn rows(count: usize) -> Vec<EmbeddingRow> {
        (0..count)
            .map(|i| EmbeddingRow {
                stream_id: format!("stream {}", i / 100),
                captured_at: EventTime(1_769_817_600_000 + i as i64),
                topic: "frames".into(),
                partition: (i % 3) as i32,
                offset: i as i64 * 2,
                row: (i % 5) as i32,
                embedding: (0..16).map(|j| (i * 16 + j) as f32 * 0.25).collect(),
            })
            .collect()
    }

    #[test]
    fn rows_read_back_over_several_row_groups_and_bytes_repeat() {
        let rows = rows(ROW_GROUP_ROWS + 77);
        let bytes = write(&rows, 16).unwrap();
        assert_eq!(write(&rows, 16).unwrap(), bytes);
        assert_eq!(read(bytes), rows);
    }

    #[test]
    fn a_file_without_rows_keeps_its_columns() {
        let bytes = write(&[], 16).unwrap();
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes.clone()).unwrap();
        let list = DataType::FixedSizeList(item(), 16);
        assert_eq!(reader.schema().field_with_name("embedding").unwrap().data_type(), &list);
        assert!(read(bytes).is_empty());
    }

    #[test]
    fn embeddings_are_stored_plain() {
        let reader = ParquetRecordBatchReaderBuilder::try_new(write(&rows(10), 16).unwrap()).unwrap();
        let group = reader.metadata().row_group(0);
        let column = group.columns().last().unwrap();
        assert_eq!(column.compression(), Compression::UNCOMPRESSED);
        assert_eq!(column.dictionary_page_offset(), None);
    }

    #[test]
    fn an_embedding_of_another_length_is_refused() {
        let error = write(&rows(2), 8).unwrap_err();
        assert_eq!(error.to_string(), "row 0 has an embedding of 16 values, not 8");
    }
}
