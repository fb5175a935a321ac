//! A period's frames on the local disk: their encoded bytes in one scratch file, or in files that were there before; what is
//! known of them in memory.
//!
//! Frames keep the order in which they were pushed; whoever pushes them gives the order that results depend on,
//! (topic, partition, offset, row). The scratch file has no name, so it goes with the process however that ends.
//! Reading is by position and needs no lock. What a frame's pixels are is not known here.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::types::EventTime;

/// Where a frame comes from, and what its producer said of it. Equal texts share their memory within a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameMeta {
    pub stream_id: Arc<str>,
    pub captured_at: EventTime,
    /// For evaluation only.
    pub label: Option<Arc<str>>,
    pub topic: Arc<str>,
    pub partition: i32,
    pub offset: i64,
    /// Row within a record of many frames; 0 in a record of one.
    pub row: i32,
}

/// Takes frames one by one; see [`FrameSet`].
pub struct FrameSetWriter {
    file: BufWriter<File>,
    metas: Vec<FrameMeta>,
    /// Where each frame lies in the file.
    spans: Vec<Range<u64>>,
    texts: HashSet<Arc<str>>,
}

impl FrameSetWriter {
    /// An empty set whose scratch file lies in `directory`.
    pub fn create(directory: &Path) -> io::Result<Self> {
        Ok(Self {
            file: BufWriter::with_capacity(1 << 20, tempfile::tempfile_in(directory)?),
            metas: Vec::new(),
            spans: Vec::new(),
            texts: HashSet::new(),
        })
    }

    /// Adds one frame after all others.
    pub fn push(&mut self, mut meta: FrameMeta, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        let start = self.spans.last().map_or(0, |span| span.end);
        self.spans.push(start..start + bytes.len() as u64);
        meta.stream_id = self.shared(meta.stream_id);
        meta.topic = self.shared(meta.topic);
        meta.label = meta.label.map(|label| self.shared(label));
        self.metas.push(meta);
        Ok(())
    }

    /// The frames in the order of pushing.
    pub fn finish(self) -> io::Result<FrameSet> {
        let bytes = Bytes::Scratch { file: self.file.into_inner()?, spans: self.spans };
        Ok(FrameSet { metas: self.metas, bytes })
    }

    /// The frames by (topic, partition, offset, row), whatever the order of pushing.
    pub fn finish_sorted(self) -> io::Result<FrameSet> {
        let mut frames: Vec<(FrameMeta, Range<u64>)> = self.metas.into_iter().zip(self.spans).collect();
        frames.sort_by(|(a, _), (b, _)| {
            (&a.topic, a.partition, a.offset, a.row).cmp(&(&b.topic, b.partition, b.offset, b.row))
        });
        let (metas, spans) = frames.into_iter().unzip();
        Ok(FrameSet { metas, bytes: Bytes::Scratch { file: self.file.into_inner()?, spans } })
    }

    fn shared(&mut self, text: Arc<str>) -> Arc<str> {
        if let Some(known) = self.texts.get(&text) {
            return Arc::clone(known);
        }
        self.texts.insert(Arc::clone(&text));
        text
    }
}

/// Frames by index, `0..len()`.
#[derive(Debug)]
pub struct FrameSet {
    metas: Vec<FrameMeta>,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    /// Where each frame lies in one file.
    Scratch { file: File, spans: Vec<Range<u64>> },
    /// A file each.
    Files(Vec<PathBuf>),
}

impl FrameSet {
    /// Of files that stay where they are, one a frame.
    pub fn of_files(frames: impl IntoIterator<Item = (FrameMeta, PathBuf)>) -> Self {
        let (metas, paths) = frames.into_iter().unzip();
        Self { metas, bytes: Bytes::Files(paths) }
    }

    pub fn len(&self) -> usize {
        self.metas.len()
    }

    pub fn is_empty(&self) -> bool {
        self.metas.is_empty()
    }

    pub fn metas(&self) -> &[FrameMeta] {
        &self.metas
    }

    pub fn meta(&self, index: usize) -> &FrameMeta {
        &self.metas[index]
    }

    /// The encoded bytes of one frame, read from its file.
    pub fn bytes(&self, index: usize) -> io::Result<Vec<u8>> {
        match &self.bytes {
            Bytes::Scratch { file, spans } => {
                let span = &spans[index];
                let mut bytes = vec![0; (span.end - span.start) as usize];
                file.read_exact_at(&mut bytes, span.start)?;
                Ok(bytes)
            }
            Bytes::Files(paths) => std::fs::read(&paths[index]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(offset: i64, label: Option<&str>) -> FrameMeta {
        FrameMeta {
            stream_id: "stream".into(),
            captured_at: EventTime(offset * 10),
            label: label.map(Arc::from),
            topic: "frames".into(),
            partition: 3,
            offset,
            row: 0,
        }
    }

    #[test]
    fn frames_read_back_in_the_order_of_pushing() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = FrameSetWriter::create(directory.path()).unwrap();
        let frames: [&[u8]; 4] = [b"first", b"", b"the third one", b"4"];
        for (i, bytes) in frames.iter().enumerate() {
            writer.push(meta(9 - i as i64, Some("map")), bytes).unwrap();
        }
        let set = writer.finish().unwrap();
        assert_eq!(set.len(), 4);
        for i in [2, 0, 3, 1] {
            assert_eq!(set.bytes(i).unwrap(), frames[i]);
            assert_eq!(*set.meta(i), meta(9 - i as i64, Some("map")));
        }
    }

    #[test]
    fn equal_texts_share_their_memory_and_the_file_has_no_name() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = FrameSetWriter::create(directory.path()).unwrap();
        (0..2).for_each(|i| writer.push(meta(i, None), b"x").unwrap());
        let set = writer.finish().unwrap();
        assert!(Arc::ptr_eq(&set.meta(0).stream_id, &set.meta(1).stream_id));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
