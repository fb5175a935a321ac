//! Is this an image that a training step will be able to decode?
//!
//! Owns: the checks of one encoded image, in the order of their cost: bytes, pixels by the header, whole
//! decoding. Invariant: no pixel is decoded before the header's size was found to be within the limit.

use std::io::Cursor;

use image::{ImageFormat, ImageReader, Limits};

use super::{FrameLimits, Reject, RejectReason};

/// Decoders need room for a frame at 16 bit RGBA and about as much again while they work.
const MAX_BYTES_PER_PIXEL: u64 = 16;

/// Checks one encoded image. `format: None` tells it from the first bytes.
pub fn check(bytes: &[u8], format: Option<ImageFormat>, limits: &FrameLimits) -> Result<(), Reject> {
    if bytes.is_empty() {
        return Err(Reject::record(RejectReason::EmptyValue, "the frame is empty"));
    }
    if bytes.len() > limits.max_frame_bytes {
        let (length, max) = (bytes.len(), limits.max_frame_bytes);
        return Err(Reject::record(
            RejectReason::FrameTooLarge,
            format!("the frame has {length} bytes, more than {max}"),
        ));
    }
    let format = match format {
        Some(format) => format,
        None => guess(bytes)?,
    };
    let (width, height) =
        ImageReader::with_format(Cursor::new(bytes), format).into_dimensions().map_err(undecodable)?;
    if u64::from(width) * u64::from(height) > limits.max_pixels {
        let max = limits.max_pixels;
        return Err(Reject::record(
            RejectReason::TooManyPixels,
            format!("{width} x {height} pixels are more than {max}"),
        ));
    }
    decode_entirely(bytes, format, limits)
}

fn guess(bytes: &[u8]) -> Result<ImageFormat, Reject> {
    let format = image::guess_format(bytes).map_err(undecodable)?;
    match format {
        ImageFormat::Jpeg | ImageFormat::Png | ImageFormat::WebP => Ok(format),
        other => Err(undecodable(format!("{other:?} is neither JPEG, PNG nor WebP"))),
    }
}

fn decode_entirely(bytes: &[u8], format: ImageFormat, limits: &FrameLimits) -> Result<(), Reject> {
    // The JPEG decoder fills what is missing with grey and says nothing.
    if format == ImageFormat::Jpeg && !jpeg_has_its_end(bytes) {
        return Err(undecodable("the JPEG ends before its end marker"));
    }
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut decoder_limits = Limits::no_limits();
    decoder_limits.max_alloc = Some(limits.max_pixels.saturating_mul(MAX_BYTES_PER_PIXEL));
    reader.limits(decoder_limits);
    reader.decode().map(drop).map_err(undecodable)
}

fn undecodable(error: impl std::fmt::Display) -> Reject {
    Reject::record(RejectReason::UndecodableImage, error.to_string())
}

/// Walks the marker segments (ITU-T T.81, annex B) until the end-of-image marker. Segments are stepped over by
/// their length, so that the end marker of a thumbnail inside one doesn't count.
fn jpeg_has_its_end(bytes: &[u8]) -> bool {
    const END_OF_IMAGE: u8 = 0xD9;
    let mut at = 2;
    while let (Some(&first), Some(&code)) = (bytes.get(at), bytes.get(at + 1)) {
        match (first, code) {
            (0xFF, END_OF_IMAGE) => return true,
            // A fill byte before a marker.
            (0xFF, 0xFF) => at += 1,
            // A stuffed byte, a restart marker, TEM or SOI: without a length.
            (0xFF, 0x00 | 0x01 | 0xD0..=0xD8) => at += 2,
            (0xFF, _) => {
                let Some(length) = bytes.get(at + 2..at + 4) else {
                    return false;
                };
                at += 2 + usize::from(u16::from_be_bytes([length[0], length[1]]));
            }
            // Entropy-coded data, or stray bytes between segments, which decoders skip too.
            _ => at += 1,
        }
    }
    false
}
