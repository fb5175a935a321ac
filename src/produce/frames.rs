//! Which frames a replay has, with their times, in the order in which they are sent.
//!
//! Invariant: the plan is a function of the source's names, columns and the chosen times alone; frames are
//! ordered by (captured_at, stream, place in the stream), so a partition's time never runs backwards by more
//! than the source itself does. The images of a folder are read when they are sent.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, Int64Type};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::DataType;
use bytes::Bytes;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::{CaptureTimes, ProduceError, ProduceSource};
use crate::ingest::columns::{
    WrongType, binary_at, column, instant_at, is_binary, is_instant, is_text, text_at,
};
use crate::types::EventTime;

/// One frame of a replay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub stream_id: String,
    pub label: Option<String>,
    pub captured_at: EventTime,
    pub image: Image,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Image {
    File(PathBuf),
    Bytes(Bytes),
}

/// A frame as the source has it.
struct Found {
    stream_id: String,
    label: Option<String>,
    recorded_at: Option<EventTime>,
    image: Image,
}

/// Lists the source's frames and gives each its time. Blocking.
pub fn plan(source: &ProduceSource, times: CaptureTimes) -> Result<Vec<Planned>, ProduceError> {
    let (path, found, expected) = match source {
        ProduceSource::Folder(path) => (path, folder(path)?, "LABEL/*.jpg, .jpeg, .png or .webp"),
        ProduceSource::Parquet(path) => (path, parquet(path)?, "no row"),
    };
    if found.is_empty() {
        return Err(ProduceError::NoFrames { path: path.clone(), expected });
    }
    schedule(path, found, times)
}

fn schedule(path: &Path, found: Vec<Found>, times: CaptureTimes) -> Result<Vec<Planned>, ProduceError> {
    let mut lengths: BTreeMap<String, i64> = BTreeMap::new();
    let mut places = Vec::with_capacity(found.len());
    for frame in &found {
        let length = lengths.entry(frame.stream_id.clone()).or_default();
        places.push(*length);
        *length += 1;
    }
    let mut placed: Vec<(i64, Found)> = places.into_iter().zip(found).collect();
    // The streams in turn.
    placed.sort_by(|(a, x), (b, y)| (a, &x.stream_id).cmp(&(b, &y.stream_id)));
    let mut planned = Vec::with_capacity(placed.len());
    for (index, (place, frame)) in placed.into_iter().enumerate() {
        let captured_at = match times {
            CaptureTimes::Recorded => frame
                .recorded_at
                .ok_or_else(|| ProduceError::NoCaptureTime { path: path.to_owned(), index })?,
            CaptureTimes::Every { start, interval_ms } => {
                start.plus_ms(interval_ms.saturating_mul(index as i64))
            }
            CaptureTimes::Spread { start, end } => {
                let span = i128::from(end.0 - start.0) * i128::from(place);
                start.plus_ms((span / i128::from(lengths[&frame.stream_id])) as i64)
            }
        };
        let Found { stream_id, label, image, .. } = frame;
        planned.push(Planned { stream_id, label, captured_at, image });
    }
    // Stable: frames of one instant stay in the streams' turn.
    planned.sort_by_key(|frame| frame.captured_at);
    Ok(planned)
}

fn folder(root: &Path) -> Result<Vec<Found>, ProduceError> {
    let mut found = Vec::new();
    for label_path in entries(root)?.into_iter().filter(|path| path.is_dir()) {
        let label = name_of(&label_path);
        for path in entries(&label_path)? {
            if content_type(&path).is_none() {
                continue;
            }
            let stream_id = match stream_of(&path) {
                Some(stream) => format!("{label}/{stream}"),
                None => label.clone(),
            };
            let image = Image::File(path);
            found.push(Found { stream_id, label: Some(label.clone()), recorded_at: None, image });
        }
    }
    Ok(found)
}

/// By name.
fn entries(directory: &Path) -> Result<Vec<PathBuf>, ProduceError> {
    let read = || -> std::io::Result<Vec<PathBuf>> {
        let mut paths: Vec<PathBuf> =
            std::fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
        paths.sort();
        Ok(paths)
    };
    read().map_err(|source| ProduceError::Read { path: directory.to_owned(), source })
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// `walk03` of `walk03-0007.jpg`.
fn stream_of(path: &Path) -> Option<String> {
    let stem = path.file_stem()?.to_string_lossy().into_owned();
    let (stream, number) = stem.rsplit_once('-')?;
    let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    (is_number && !stream.is_empty()).then(|| stream.to_owned())
}

/// The content type of a file by its name; `None`: no image that we take.
fn content_type(path: &Path) -> Option<&'static str> {
    match path.extension()?.to_string_lossy().to_ascii_lowercase().as_str() {
        "jpg" | "jpeg" => Some("image/jpeg"),
        "png" => Some("image/png"),
        "webp" => Some("image/webp"),
        _ => None,
    }
}

/// The content type of an encoded image by its first bytes. Unknown bytes are sent as JPEG: the consumer says
/// what is wrong with them.
pub fn content_type_of(image: &[u8]) -> &'static str {
    match image::guess_format(image) {
        Ok(image::ImageFormat::Png) => "image/png",
        Ok(image::ImageFormat::WebP) => "image/webp",
        _ => "image/jpeg",
    }
}

fn parquet(path: &Path) -> Result<Vec<Found>, ProduceError> {
    let file = File::open(path).map_err(|source| ProduceError::Read { path: path.to_owned(), source })?;
    let wrong =
        |source: crate::store::segment::SegmentError| ProduceError::Parquet { path: path.to_owned(), source };
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).and_then(|builder| builder.build());
    let mut found = Vec::new();
    for batch in reader.map_err(|error| wrong(error.into()))? {
        let batch = batch.map_err(|error| wrong(error.into()))?;
        let bad = |what: String| ProduceError::BadRow { path: path.to_owned(), what };
        rows(&batch, &name_of(path), &mut found).map_err(bad)?;
    }
    Ok(found)
}

fn rows(batch: &RecordBatch, file: &str, found: &mut Vec<Found>) -> Result<(), String> {
    let text = |error: WrongType| error.to_string();
    let images = images(batch)?;
    let labels = column(batch, "label", |t| is_text(t) || is_integer(t)).map_err(text)?;
    let streams = column(batch, "stream_id", is_text).map_err(text)?;
    let instants = column(batch, "captured_at", is_instant).map_err(text)?;
    for index in 0..batch.num_rows() {
        let label = labels.as_ref().and_then(|column| label_at(column, index));
        let stream_id = streams.as_ref().and_then(|column| text_at(column, index));
        found.push(Found {
            stream_id: stream_id.or_else(|| label.clone()).unwrap_or_else(|| file.to_owned()),
            label,
            recorded_at: instants.as_ref().and_then(|column| instant_at(column, index)),
            image: Image::Bytes(binary_at(&images, index)),
        });
    }
    Ok(())
}

fn images(batch: &RecordBatch) -> Result<ArrayRef, String> {
    let column = batch.column_by_name("image").ok_or("it has no column image")?;
    let bytes = match column.as_struct_opt() {
        Some(image) => image.column_by_name("bytes").ok_or("column image has no field bytes")?,
        None => column,
    };
    match is_binary(bytes.data_type()) {
        true => Ok(bytes.clone()),
        false => Err(format!("column image is of type {}", bytes.data_type())),
    }
}

fn is_integer(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Int32 | DataType::Int64)
}

fn label_at(column: &ArrayRef, index: usize) -> Option<String> {
    if column.is_null(index) {
        return None;
    }
    match column.data_type() {
        DataType::Int32 => Some(column.as_primitive::<Int32Type>().value(index).to_string()),
        DataType::Int64 => Some(column.as_primitive::<Int64Type>().value(index).to_string()),
        _ => text_at(column, index),
    }
}
