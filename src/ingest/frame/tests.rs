use std::io::Cursor;
use std::sync::Arc;

use ::image::{DynamicImage, ImageFormat, RgbImage};
use arrow_array::{
    ArrayRef, BinaryArray, Int64Array, LargeBinaryArray, LargeStringArray, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow_ipc::writer::StreamWriter;
use bytes::Bytes;

use super::*;

const NOW: EventTime = EventTime(1_769_817_600_000);

fn picture(format: ImageFormat) -> Bytes {
    let image = RgbImage::from_fn(64, 48, |x, y| ::image::Rgb([x as u8 * 3, y as u8 * 5, 77]));
    let mut bytes = Cursor::new(Vec::new());
    DynamicImage::ImageRgb8(image).write_to(&mut bytes, format).unwrap();
    bytes.into_inner().into()
}

fn record(content_type: &str, value: impl Into<Bytes>) -> Record {
    Record {
        topic: "frames".into(),
        partition: 0,
        offset: 7,
        key: Some("camera-1".into()),
        timestamp: Some(NOW.minus_ms(5)),
        headers: vec![(CONTENT_TYPE.into(), Bytes::from(content_type.to_owned()))],
        value: Value::Bytes(value.into()),
    }
}

fn with_header(mut record: Record, name: &str, value: &str) -> Record {
    record.headers.push((name.into(), Bytes::from(value.to_owned())));
    record
}

fn reason(record: &Record) -> RejectReason {
    let decoded = decode(record, &FrameLimits::default(), NOW);
    assert!(decoded.frames.is_empty(), "{decoded:?}");
    assert_eq!(decoded.rejects.len(), 1);
    assert_eq!(decoded.rejects[0].row, None);
    decoded.rejects[0].reason
}

/// A PNG whose header claims 30,000 x 30,000 pixels, with a valid checksum and little behind it.
fn huge_png() -> Bytes {
    let mut bytes = picture(ImageFormat::Png).to_vec();
    bytes[16..20].copy_from_slice(&30_000u32.to_be_bytes());
    bytes[20..24].copy_from_slice(&30_000u32.to_be_bytes());
    let crc = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
    bytes.into()
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
    })
}

fn arrow(columns: Vec<(&str, ArrayRef)>) -> Vec<u8> {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer = StreamWriter::try_new(Vec::new(), &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

#[test]
fn each_image_type_becomes_one_frame_with_the_records_key_and_timestamp() {
    for (content_type, format) in [
        ("image/jpeg", ImageFormat::Jpeg),
        ("image/png", ImageFormat::Png),
        ("IMAGE/WEBP; q=1", ImageFormat::WebP),
    ] {
        let image = picture(format);
        let decoded = decode(&record(content_type, image.clone()), &FrameLimits::default(), NOW);
        let expected = Frame {
            offset: 7,
            row: 0,
            stream_id: "camera-1".into(),
            captured_at: NOW.minus_ms(5),
            label: None,
            image,
        };
        assert_eq!(decoded.frames, vec![expected]);
        assert_eq!(decoded.rejects, vec![]);
    }
}

#[test]
fn headers_win_over_key_and_timestamp() {
    let record = record("image/jpeg", picture(ImageFormat::Jpeg));
    let record = with_header(record, STREAM_ID, "walk-3");
    let record = with_header(record, CAPTURED_AT, "1769817000000");
    let record = with_header(record, LABEL, "MAP05");
    let frame = &decode(&record, &FrameLimits::default(), NOW).frames[0];
    assert_eq!(frame.stream_id, "walk-3");
    assert_eq!(frame.captured_at, EventTime(1_769_817_000_000));
    assert_eq!(frame.label.as_deref(), Some("MAP05"));
}

#[test]
fn every_cut_of_a_jpeg_is_rejected() {
    let whole = picture(ImageFormat::Jpeg);
    for length in [3, whole.len() / 4, whole.len() / 2, whole.len() - 2, whole.len() - 1] {
        let cut = record("image/jpeg", whole.slice(..length));
        assert_eq!(reason(&cut), RejectReason::UndecodableImage, "{length}");
    }
}

#[test]
fn a_truncated_png_and_webp_are_rejected() {
    for (content_type, format) in [("image/png", ImageFormat::Png), ("image/webp", ImageFormat::WebP)] {
        let whole = picture(format);
        let cut = record(content_type, whole.slice(..whole.len() / 2));
        assert_eq!(reason(&cut), RejectReason::UndecodableImage);
    }
}

#[test]
fn a_huge_header_is_rejected_by_its_pixels() {
    assert_eq!(reason(&record("image/png", huge_png())), RejectReason::TooManyPixels);
}

#[test]
fn records_that_are_nothing_are_rejected_with_the_reason() {
    let jpeg = || picture(ImageFormat::Jpeg);
    let mut null = record("image/jpeg", jpeg());
    null.value = Value::Empty;
    assert_eq!(reason(&null), RejectReason::EmptyValue);
    assert_eq!(reason(&record("image/jpeg", Bytes::new())), RejectReason::EmptyValue);
    assert_eq!(reason(&record("text/plain", jpeg())), RejectReason::UnknownContentType);
    let mut untyped = record("image/jpeg", jpeg());
    untyped.headers.clear();
    assert_eq!(reason(&untyped), RejectReason::MissingContentType);
    let mut keyless = record("image/jpeg", jpeg());
    keyless.key = None;
    assert_eq!(reason(&keyless), RejectReason::MissingStreamId);
    let mut timeless = record("image/jpeg", jpeg());
    timeless.timestamp = None;
    assert_eq!(reason(&timeless), RejectReason::MissingCapturedAt);
    let odd = with_header(record("image/jpeg", jpeg()), CAPTURED_AT, "yesterday");
    assert_eq!(reason(&odd), RejectReason::BadHeader);
    let mut large = record("image/jpeg", jpeg());
    large.value = Value::Oversized { bytes: 40 << 20 };
    assert_eq!(reason(&large), RejectReason::RecordTooLarge);
    let frame = record("image/jpeg", vec![0xFF; 9 << 20]);
    assert_eq!(reason(&frame), RejectReason::FrameTooLarge);
}

#[test]
fn instants_of_1970_and_2099_are_rejected() {
    let at = |ms: &str| with_header(record("image/jpeg", picture(ImageFormat::Jpeg)), CAPTURED_AT, ms);
    assert_eq!(reason(&at("0")), RejectReason::CapturedTooEarly);
    assert_eq!(reason(&at("4070908800000")), RejectReason::CapturedAhead);
    let just_ahead = at(&NOW.plus_ms(300_000).as_ms().to_string());
    assert_eq!(decode(&just_ahead, &FrameLimits::default(), NOW).frames.len(), 1);
}

#[test]
fn a_batch_gives_its_rows_and_a_bad_row_costs_itself_alone() {
    let (jpeg, png) = (picture(ImageFormat::Jpeg), picture(ImageFormat::Png));
    let frames: Vec<&[u8]> = vec![&jpeg, &jpeg[..40], &png];
    let value = arrow(vec![
        (FRAME, Arc::new(BinaryArray::from_vec(frames)) as ArrayRef),
        (STREAM_ID, Arc::new(StringArray::from(vec![Some("a"), Some("b"), None]))),
        (CAPTURED_AT, Arc::new(Int64Array::from(vec![Some(NOW.0), Some(NOW.0), None]))),
        (LABEL, Arc::new(StringArray::from(vec![Some("cat"), None, None]))),
    ]);
    let decoded = decode(&record(ARROW_STREAM, value), &FrameLimits::default(), NOW);
    let seen: Vec<_> = decoded
        .frames
        .iter()
        .map(|f| (f.row, f.stream_id.as_str(), f.captured_at, f.label.as_deref()))
        .collect();
    assert_eq!(seen, vec![(0, "a", NOW, Some("cat")), (2, "camera-1", NOW.minus_ms(5), None)]);
    assert_eq!(decoded.frames[1].image, png);
    assert_eq!(decoded.rejects.len(), 1);
    assert_eq!(decoded.rejects[0].row, Some(1));
    assert_eq!(decoded.rejects[0].reason, RejectReason::UndecodableImage);
}

#[test]
fn a_batch_of_large_types_and_microseconds_reads_alike() {
    let jpeg = picture(ImageFormat::Jpeg);
    let value = arrow(vec![
        (FRAME, Arc::new(LargeBinaryArray::from_vec(vec![&jpeg[..]])) as ArrayRef),
        (STREAM_ID, Arc::new(LargeStringArray::from(vec!["a"]))),
        (CAPTURED_AT, Arc::new(TimestampMicrosecondArray::from(vec![NOW.0 * 1000 + 999]))),
    ]);
    let decoded = decode(&record(ARROW_STREAM, value), &FrameLimits::default(), NOW);
    assert_eq!(decoded.frames[0].captured_at, NOW);
    assert_eq!(decoded.frames[0].image, jpeg);
}

#[test]
fn a_broken_arrow_stream_gives_no_frame_wherever_it_breaks() {
    let jpeg = picture(ImageFormat::Jpeg);
    let one = arrow(vec![(FRAME, Arc::new(BinaryArray::from_vec(vec![&jpeg[..]])) as ArrayRef)]);
    // The stream's last eight bytes are its end marker: without them it is still whole by the format.
    for length in (1..one.len() - 8).step_by(97) {
        let cut = record(ARROW_STREAM, one[..length].to_vec());
        let decoded = decode(&cut, &FrameLimits::default(), NOW);
        assert!(decoded.frames.is_empty(), "{length}");
        assert_eq!(decoded.rejects.len(), 1, "{length}");
    }
    // Rows before the break don't save the record.
    let mut two = one[..one.len() - 8].to_vec();
    two.extend_from_slice(&[0xFF, 0xFF, 0xFF, 0xFF, 0x40, 0, 0, 0, 1, 2, 3]);
    assert_eq!(reason(&record(ARROW_STREAM, two)), RejectReason::BrokenArrowStream);
    assert_eq!(reason(&record(ARROW_STREAM, vec![0x80; 64])), RejectReason::BrokenArrowStream);
}

#[test]
fn a_batch_without_frames_or_with_too_many_rows_is_rejected_whole() {
    let text = arrow(vec![(FRAME, Arc::new(StringArray::from(vec!["text"])) as ArrayRef)]);
    assert_eq!(reason(&record(ARROW_STREAM, text)), RejectReason::BadColumn);
    let other = arrow(vec![("other", Arc::new(Int64Array::from(vec![1])) as ArrayRef)]);
    assert_eq!(reason(&record(ARROW_STREAM, other)), RejectReason::BadColumn);
    let many = arrow(vec![(FRAME, Arc::new(BinaryArray::from_vec(vec![b"x"; 4097])) as ArrayRef)]);
    assert_eq!(reason(&record(ARROW_STREAM, many)), RejectReason::TooManyRows);
}

#[test]
fn a_punctuation_states_its_watermark_and_a_bad_one_is_rejected() {
    let good = record(WATERMARK_JSON, punctuation_value(NOW));
    let decoded = decode(&good, &FrameLimits::default(), NOW);
    assert_eq!(decoded.watermark, Some(NOW));
    assert!(decoded.frames.is_empty() && decoded.rejects.is_empty());
    assert_eq!(reason(&record(WATERMARK_JSON, "{}")), RejectReason::BadPunctuation);
    let far = punctuation_value("2099-01-01T00:00:00Z".parse().unwrap());
    assert_eq!(reason(&record(WATERMARK_JSON, far)), RejectReason::CapturedAhead);
}
