//! From an encoded image to the input of an encoder: decoding, the evaluation view, normalisation.
//!
//! Evaluation, publication and serving all embed through this file, so that the same bytes give the same
//! embedding everywhere. The view is torchvision's `Resize(size)` + `CenterCrop(size)`, bilinear with
//! antialiasing, as the published `config.json` says. Nothing here is random: augmentation is training's.

use std::io::Cursor;

use candle_core::{Device, Tensor};
use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::error::DecodingError;
use image::{ImageError, ImageFormat, ImageReader, Limits};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::{Encoder, Mode, ModelError};

/// Pixels of the largest image that is decoded where the caller has no limit of its own; 8192 x 8192, 192 MiB
/// decoded. Larger lets one image take a host's memory, smaller refuses photographs.
pub const MAX_PIXELS: u64 = 1 << 26;

/// Why an image has no view.
#[derive(Debug, thiserror::Error)]
pub enum PreprocessError {
    #[error("an image of {width} x {height} pixels is larger than the limit of {max_pixels} pixels")]
    TooLarge { width: u32, height: u32, max_pixels: u64 },
    #[error("an image of {width} x {height} pixels has none")]
    Empty { width: u32, height: u32 },
    #[error("not a readable image: {0}")]
    Undecodable(#[from] ImageError),
    #[error("the image could not be resized: {0}")]
    Resize(String),
    #[error("the encoder failed: {0}")]
    Encoder(#[from] ModelError),
    #[error("the views could not be moved to or from the device: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// A decoded frame: rows from the top, three bytes a pixel (red, green, blue).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RgbFrame {
    pub width: u32,
    pub height: u32,
    pub pixels: Vec<u8>,
}

/// A rectangle of a frame in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crop {
    pub left: u32,
    pub top: u32,
    pub width: u32,
    pub height: u32,
}

/// Decoders need room for a frame at 16 bit RGBA and about as much again while they work. Not less than ingest
/// grants them: what it accepted must decode here too.
const MAX_BYTES_PER_PIXEL: u64 = 16;

/// A byte as a number in 0..1.
const UNIT: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = byte as f32 / 255.0;
        byte += 1;
    }
    table
};

/// [`RgbFrame::decode`] into a new frame.
pub fn decode_rgb(bytes: &[u8], max_pixels: u64) -> Result<RgbFrame, PreprocessError> {
    let mut frame = RgbFrame::default();
    frame.decode(bytes, max_pixels)?;
    Ok(frame)
}

impl RgbFrame {
    /// Decodes JPEG, PNG or WebP in the memory of an earlier frame, of which nothing remains (after an error, nothing
    /// that means anything). The size is read from the header and compared with `max_pixels` before any pixel is
    /// decoded. Grey becomes three equal channels; transparency and EXIF orientation are ignored.
    pub fn decode(&mut self, bytes: &[u8], max_pixels: u64) -> Result<(), PreprocessError> {
        if image::guess_format(bytes)? == ImageFormat::Jpeg {
            return self.decode_jpeg(bytes, max_pixels);
        }
        let reader =
            || ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(ImageError::IoError);
        (self.width, self.height) = reader()?.into_dimensions()?;
        self.check_size(max_pixels)?;
        let mut reader = reader()?;
        let mut limits = Limits::no_limits();
        limits.max_alloc = Some(max_pixels.saturating_mul(MAX_BYTES_PER_PIXEL));
        reader.limits(limits);
        self.pixels = reader.decode()?.into_rgb8().into_raw();
        Ok(())
    }

    /// The decoder that `image` uses, with the options that it gives, but one pass over the header instead of its
    /// three: each builds the Huffman tables, which for a small frame costs more than its pixels.
    fn decode_jpeg(&mut self, bytes: &[u8], max_pixels: u64) -> Result<(), PreprocessError> {
        let error = |e| ImageError::Decoding(DecodingError::new(ImageFormat::Jpeg.into(), e));
        let options = DecoderOptions::default()
            .set_strict_mode(false)
            .set_max_width(usize::MAX)
            .set_max_height(usize::MAX)
            .jpeg_set_out_colorspace(ColorSpace::RGB);
        let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
        decoder.decode_headers().map_err(error)?;
        let (width, height) = decoder.info().map_or((0, 0), |info| (info.width, info.height));
        (self.width, self.height) = (width.into(), height.into());
        self.check_size(max_pixels)?;
        // Zeroed, not only made long enough: of a truncated image not every pixel is written.
        self.pixels.clear();
        self.pixels.resize(3 * usize::from(width) * usize::from(height), 0);
        decoder.decode_into(&mut self.pixels).map_err(error)?;
        Ok(())
    }

    fn check_size(&self, max_pixels: u64) -> Result<(), PreprocessError> {
        let Self { width, height, .. } = *self;
        if width == 0 || height == 0 {
            return Err(PreprocessError::Empty { width, height });
        }
        if u64::from(width) * u64::from(height) > max_pixels {
            return Err(PreprocessError::TooLarge { width, height, max_pixels });
        }
        Ok(())
    }
}

/// Resizes parts of frames, bilinear, antialiased where it shrinks them. Keeps its memory for the next one.
#[derive(Debug, Default)]
pub struct Scaler {
    resizer: Resizer,
    pixels: Vec<u8>,
}

impl Scaler {
    /// The part of `frame` inside `crop` as `width` x `height` pixels: bytes as in [`RgbFrame::pixels`].
    pub fn crop(
        &mut self,
        frame: &RgbFrame,
        crop: Crop,
        [width, height]: [u32; 2],
    ) -> Result<&[u8], PreprocessError> {
        let Crop { left, top, width: cut_width, height: cut_height } = crop;
        self.cut(frame, [left, top, cut_width, cut_height].map(f64::from), [width, height])
    }

    /// The same of a box `[left, top, width, height]` whose edges may lie between pixels. What is allocated follows
    /// from the box and the target, however long the frame's other side is.
    fn cut(
        &mut self,
        frame: &RgbFrame,
        cut: [f64; 4],
        [width, height]: [u32; 2],
    ) -> Result<&[u8], PreprocessError> {
        let error = |e: &dyn std::fmt::Display| PreprocessError::Resize(e.to_string());
        let source = ImageRef::new(frame.width, frame.height, &frame.pixels, PixelType::U8x3)
            .map_err(|e| error(&e))?;
        self.pixels.resize(3 * width as usize * height as usize, 0);
        let mut target =
            Image::from_slice_u8(width, height, &mut self.pixels, PixelType::U8x3).map_err(|e| error(&e))?;
        let [left, top, cut_width, cut_height] = cut;
        let options = ResizeOptions::new()
            .resize_alg(ResizeAlg::Convolution(FilterType::Bilinear))
            .crop(left, top, cut_width, cut_height);
        self.resizer.resize(&source, &mut target, &options).map_err(|e| error(&e))?;
        Ok(&self.pixels)
    }
}

/// What an encoder expects of its input: a square of `size` pixels, normalised per channel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preprocessing {
    pub size: usize,
    /// Per channel, of pixels in 0..1.
    pub mean: [f32; 3],
    pub std: [f32; 3],
}

impl Preprocessing {
    /// Numbers in one view, `3 * size * size`.
    pub fn view_len(&self) -> usize {
        3 * self.size * self.size
    }

    /// The view without randomness: the shorter side resized to `size`, the centre cut out. Writes `[3, size, size]`.
    ///
    /// Cut first and then resized, so that a frame of one pixel by millions costs no more than a square one. It is
    /// the same view: the cut's edges are torchvision's, taken back into the frame, and may lie between its pixels.
    pub fn evaluation_view(&self, frame: &RgbFrame, out: &mut [f32]) -> Result<(), PreprocessError> {
        let size = self.size as u32;
        let mut scaler = Scaler::default();
        let pixels = scaler.cut(frame, central_box(size, frame.width, frame.height), [size, size])?;
        to_planes(pixels, out);
        self.normalise(out);
        Ok(())
    }

    /// Normalises the planes of a view, `[3, size, size]` in 0..1.
    // Inlined: a caller's wider instructions then hold here too.
    #[inline(always)]
    pub fn normalise(&self, view: &mut [f32]) {
        for (channel, plane) in view.chunks_exact_mut(self.size * self.size).enumerate() {
            let (mean, std) = (self.mean[channel], self.std[channel]);
            plane.iter_mut().for_each(|value| *value = (*value - mean) / std);
        }
    }
}

/// From bytes pixel by pixel to numbers in 0..1 plane by plane: red, green, blue.
#[inline(always)]
pub fn to_planes(pixels: &[u8], planes: &mut [f32]) {
    let (red, rest) = planes.split_at_mut(pixels.len() / 3);
    let (green, blue) = rest.split_at_mut(red.len());
    for (((pixel, red), green), blue) in pixels.as_chunks::<3>().0.iter().zip(red).zip(green).zip(blue) {
        [*red, *green, *blue] = pixel.map(|byte| UNIT[usize::from(byte)]);
    }
}

/// The part of a `width` x `height` frame that `Resize(size)` + `CenterCrop(size)` show: `[left, top, width, height]`.
fn central_box(size: u32, width: u32, height: u32) -> [f64; 4] {
    let (resized_width, resized_height) = shorter_side_to(size, width, height);
    // Multiplied before it is divided: a side that is cut nowhere comes out whole.
    let in_frame = |at: u64, length: u32, resized: u64| at as f64 * f64::from(length) / resized as f64;
    [
        in_frame(centre_offset(resized_width, size), width, resized_width),
        in_frame(centre_offset(resized_height, size), height, resized_height),
        in_frame(size.into(), width, resized_width),
        in_frame(size.into(), height, resized_height),
    ]
}

/// torchvision's `Resize(size)`: the longer side is cut down to a whole pixel.
fn shorter_side_to(size: u32, width: u32, height: u32) -> (u64, u64) {
    let longer = |shorter_side: u32, longer_side: u32| {
        u64::from(size) * u64::from(longer_side) / u64::from(shorter_side)
    };
    if width <= height { (size.into(), longer(width, height)) } else { (longer(height, width), size.into()) }
}

/// torchvision's `CenterCrop(size)`: half of the rest, halves rounded to even.
fn centre_offset(length: u64, size: u32) -> u64 {
    ((length - u64::from(size)) as f64 / 2.0).round_ties_even() as u64
}

/// Embeds evaluation views in eval mode, `views.len() / view_len` of them: row-major `[views, encoder.feature_dim()]`.
/// Reads the result back from the device: a synchronisation point.
pub fn embed_views(
    encoder: &dyn Encoder,
    views: Vec<f32>,
    preprocessing: &Preprocessing,
    device: &Device,
) -> Result<Vec<f32>, PreprocessError> {
    let count = views.len() / preprocessing.view_len();
    if count == 0 {
        return Ok(Vec::new());
    }
    let shape = (count, 3, preprocessing.size, preprocessing.size);
    let input = Tensor::from_vec(views, shape, device)?;
    let features = encoder.forward(&input, Mode::Eval)?.detach();
    Ok(features.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Preprocessing = Preprocessing { size: 8, mean: [0.0; 3], std: [1.0; 3] };

    fn encoded(width: u32, height: u32, format: ImageFormat) -> Vec<u8> {
        let picture =
            image::RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 10) as u8, (y * 10) as u8, 200]));
        let mut bytes = Cursor::new(Vec::new());
        picture.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    /// Of a PNG chunk.
    fn crc32(bytes: &[u8]) -> u32 {
        let shift = |crc: u32| (crc >> 1) ^ (0xEDB8_8320 * (crc & 1));
        !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| shift(crc)))
    }

    fn flat(width: u32, height: u32, colour: [u8; 3]) -> RgbFrame {
        RgbFrame { width, height, pixels: colour.repeat((width * height) as usize) }
    }

    #[test]
    fn png_reads_back_pixel_by_pixel_and_jpeg_in_its_size() {
        let frame = decode_rgb(&encoded(5, 3, ImageFormat::Png), MAX_PIXELS).unwrap();
        assert_eq!((frame.width, frame.height), (5, 3));
        assert_eq!(frame.pixels[3 * (2 * 5 + 4)..], [40, 20, 200]);
        let frame = decode_rgb(&encoded(16, 8, ImageFormat::Jpeg), MAX_PIXELS).unwrap();
        assert_eq!(frame.pixels.len(), 3 * 16 * 8);
    }

    /// In colour and in grey, whole and truncated, in the memory of an earlier and larger frame.
    #[test]
    fn a_jpeg_has_the_pixels_that_the_image_crate_decodes() {
        let colour = encoded(45, 37, ImageFormat::Jpeg);
        let mut grey = Cursor::new(Vec::new());
        let picture = image::GrayImage::from_fn(31, 20, |x, y| image::Luma([(x * y) as u8]));
        picture.write_to(&mut grey, ImageFormat::Jpeg).unwrap();
        let mut frame = flat(60, 60, [77, 77, 77]);
        for bytes in [&colour[..], &colour[..colour.len() - 100], grey.get_ref()] {
            frame.decode(bytes, MAX_PIXELS).unwrap();
            let expected = image::load_from_memory(bytes).unwrap().into_rgb8();
            assert_eq!((frame.width, frame.height), expected.dimensions());
            assert!(frame.pixels == expected.into_raw());
        }
    }

    #[test]
    fn a_header_that_promises_too_many_pixels_is_refused_before_decoding() {
        let mut bytes = encoded(5, 3, ImageFormat::Png);
        // IHDR's width and height become 30,000; what lies behind it is far too short for that.
        bytes[16..24].copy_from_slice(&[0, 0, 0x75, 0x30, 0, 0, 0x75, 0x30]);
        let checksum = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&checksum.to_be_bytes());
        let error = decode_rgb(&bytes, MAX_PIXELS).unwrap_err();
        assert!(matches!(error, PreprocessError::TooLarge { width: 30_000, height: 30_000, .. }), "{error}");
        let bytes = encoded(5, 3, ImageFormat::Png);
        let error = decode_rgb(&bytes, 14).unwrap_err();
        assert!(matches!(error, PreprocessError::TooLarge { .. }), "{error}");
    }

    #[test]
    fn what_is_no_image_is_refused() {
        assert!(decode_rgb(b"", MAX_PIXELS).is_err());
        assert!(decode_rgb(b"no image at all", MAX_PIXELS).is_err());
        let whole = encoded(64, 64, ImageFormat::Png);
        assert!(decode_rgb(&whole[..whole.len() / 2], MAX_PIXELS).is_err());
    }

    #[test]
    fn the_evaluation_view_takes_the_centre_of_the_longer_side() {
        let mut frame = flat(24, 8, [0, 0, 0]);
        for y in 0..8 {
            for x in 8..16 {
                let at = 3 * (y * 24 + x);
                frame.pixels[at..at + 3].copy_from_slice(&[255, 128, 0]);
            }
        }
        let mut view = vec![f32::NAN; PLAIN.view_len()];
        PLAIN.evaluation_view(&frame, &mut view).unwrap();
        assert!(view[..64].iter().all(|red| *red == 1.0));
        assert!(view[64..128].iter().all(|green| *green == 128.0 / 255.0));
        assert!(view[128..].iter().all(|blue| *blue == 0.0));
    }

    #[test]
    fn sides_follow_torchvision() {
        assert_eq!(shorter_side_to(224, 500, 375), (298, 224));
        assert_eq!(shorter_side_to(32, 33, 100), (32, 96));
        assert_eq!(centre_offset(298, 224), 37);
        assert_eq!(centre_offset(227, 224), 2);
        assert_eq!(centre_offset(225, 224), 0);
    }

    /// Resized as a whole and cut afterwards: torchvision's order, which costs what the longer side asks for.
    fn resized_then_cut(frame: &RgbFrame, size: u32) -> Vec<u8> {
        let (width, height) = shorter_side_to(size, frame.width, frame.height);
        let whole = Crop { left: 0, top: 0, width: frame.width, height: frame.height };
        let mut scaler = Scaler::default();
        let resized = scaler.crop(frame, whole, [width as u32, height as u32]).unwrap();
        let (left, top) = (centre_offset(width, size) as usize, centre_offset(height, size) as usize);
        (top..top + size as usize)
            .flat_map(|y| {
                let at = 3 * (y * width as usize + left);
                resized[at..at + 3 * size as usize].to_vec()
            })
            .collect()
    }

    #[test]
    fn cutting_before_resizing_gives_torchvisions_view_whatever_the_sides() {
        for (width, height) in [(8, 8), (9, 8), (5, 8), (31, 17), (17, 31), (100, 33), (3, 200), (64, 64)] {
            let frame = decode_rgb(&encoded(width, height, ImageFormat::Png), MAX_PIXELS).unwrap();
            let mut scaler = Scaler::default();
            let view = scaler.cut(&frame, central_box(8, width, height), [8, 8]).unwrap();
            let differences = view.iter().zip(resized_then_cut(&frame, 8)).map(|(a, b)| a.abs_diff(b));
            assert!(differences.max().unwrap() <= 1, "{width} x {height}");
        }
    }

    /// Resized as a whole, its longer side would have 3.2 billion pixels.
    #[test]
    fn a_frame_of_one_pixel_by_millions_costs_what_a_square_one_does() {
        let preprocessing = Preprocessing { size: 64, ..PLAIN };
        let mut view = vec![f32::NAN; preprocessing.view_len()];
        for (width, height) in [(1, 50_000_000), (50_000_000, 1), (1, 100_000)] {
            preprocessing.evaluation_view(&flat(width, height, [255, 0, 51]), &mut view).unwrap();
            let plane = 64 * 64;
            assert!(view[..plane].iter().all(|red| *red == 1.0), "{width} x {height}");
            assert!(view[2 * plane..].iter().all(|blue| *blue == 0.2), "{width} x {height}");
        }
    }

    #[test]
    fn normalisation_is_per_channel() {
        let preprocessing = Preprocessing { size: 8, mean: [0.5, 0.25, 0.0], std: [0.5, 0.25, 2.0] };
        let mut view = vec![f32::NAN; preprocessing.view_len()];
        preprocessing.evaluation_view(&flat(9, 20, [255, 0, 255]), &mut view).unwrap();
        assert_eq!((view[0], view[64], view[128]), (1.0, -1.0, 0.5));
    }

    #[test]
    fn a_crop_is_resized_from_its_own_pixels() {
        let frame = decode_rgb(&encoded(16, 16, ImageFormat::Png), MAX_PIXELS).unwrap();
        let crop = Crop { left: 3, top: 5, width: 4, height: 4 };
        let mut scaler = Scaler::default();
        let cut = scaler.crop(&frame, crop, [4, 4]).unwrap();
        assert_eq!(cut[..3], [30, 50, 200]);
        assert_eq!(cut[3 * 15..], [60, 80, 200]);
        assert!(scaler.crop(&frame, Crop { left: 13, ..crop }, [4, 4]).is_err());
    }
}
