//! A layout of ours: `DIR/NN-name/{train,test}/LABEL/*.{png,jpg,jpeg}`, a folder a period, in the order of names.

use std::path::Path;

use super::{Found, FoundPeriod, StreamError, folders, images, name};

const LAYOUT: &str = "a stream is DIR/NN-name/{train,test}/LABEL/*.png or *.jpg";

pub(super) fn find(root: &Path) -> Result<Vec<FoundPeriod>, StreamError> {
    let mut periods = Vec::new();
    for folder in folders(root)? {
        let [train, test] = ["train", "test"].map(|half| find_half(&folder.join(half)));
        periods.push(FoundPeriod { name: name(&folder), train: train?, test: test? });
    }
    if periods.is_empty() {
        return Err(StreamError::Empty { path: root.to_owned(), what: "period", layout: LAYOUT });
    }
    Ok(periods)
}

fn find_half(folder: &Path) -> Result<Vec<Found>, StreamError> {
    let mut frames = Vec::new();
    for label in folders(folder)? {
        let found = images(&label, &name(&label))?;
        if found.is_empty() {
            return Err(StreamError::Empty { path: label, what: "frame", layout: LAYOUT });
        }
        frames.extend(found);
    }
    if frames.is_empty() {
        return Err(StreamError::Empty { path: folder.to_owned(), what: "label", layout: LAYOUT });
    }
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{read, write_stream};
    use super::super::{Source, Stream};
    use super::*;

    fn read_folder(folder: &Path) -> Result<Stream, String> {
        read(folder, Source::Folder(folder.into()))
    }

    #[test]
    fn a_stream_is_read_by_period_half_and_label() {
        let folder = tempfile::tempdir().unwrap();
        write_stream(folder.path(), &[2, 3], (3, 2));
        std::fs::write(folder.path().join("LICENCE"), "free").unwrap();
        let stream = read_folder(folder.path()).unwrap();
        let [a, b] = &stream.periods[..] else { panic!("{} periods", stream.periods.len()) };
        assert_eq!((a.name.as_str(), b.name.as_str()), ("01-part", "02-part"));
        assert_eq!((a.train, a.frames.len(), b.train, b.frames.len()), (6, 10, 9, 15));
        assert_eq!(a.labels, [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]);
        assert_eq!(a.label_names, ["label0", "label1"]);
        assert_eq!(&*a.frames.meta(7).stream_id, "01-part/test/label0/f01.png");
        assert_eq!(a.split().queries, [6, 7, 8, 9]);
        assert_eq!(
            a.frames.bytes(7).unwrap(),
            std::fs::read(folder.path().join("01-part/test/label0/f01.png")).unwrap()
        );
    }

    #[test]
    fn the_digest_is_that_of_every_byte_and_name() {
        let digest = |change: &dyn Fn(&Path)| {
            let folder = tempfile::tempdir().unwrap();
            write_stream(folder.path(), &[2], (2, 1));
            change(folder.path());
            read_folder(folder.path()).unwrap().digest
        };
        let same = digest(&|_| ());
        assert_eq!(same, digest(&|_| ()));
        let frame = "01-part/train/label0/f00.png";
        assert_ne!(same, digest(&|folder| std::fs::write(folder.join(frame), "other").unwrap()));
        let renamed = "01-part/train/label0/f000.png";
        assert_ne!(
            same,
            digest(&|folder| std::fs::rename(folder.join(frame), folder.join(renamed)).unwrap())
        );
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let message = |change: &dyn Fn(&Path)| {
            let folder = tempfile::tempdir().unwrap();
            write_stream(folder.path(), &[2], (2, 1));
            change(folder.path());
            read_folder(folder.path()).err().expect("an error")
        };
        let remove =
            |name: &'static str| move |folder: &Path| std::fs::remove_dir_all(folder.join(name)).unwrap();
        assert!(message(&remove("01-part")).starts_with("DIR holds no period; a stream is DIR/NN-name"));
        assert!(message(&remove("01-part/test")).starts_with("DIR/01-part/test can't be read"));
        assert_eq!(
            message(&remove("01-part/test/label1")),
            "01-part has the label \"label1\" in its train frames alone"
        );
        let gif = |folder: &Path| std::fs::write(folder.join("01-part/train/label0/x.gif"), "").unwrap();
        assert_eq!(message(&gif), "DIR/01-part/train/label0/x.gif is neither .png nor .jpg");
        let one_label = |folder: &Path| {
            for half in ["train", "test"] {
                std::fs::remove_dir_all(folder.join("01-part").join(half).join("label1")).unwrap();
            }
        };
        assert_eq!(message(&one_label), "01-part has the one label \"label0\": nothing can be told apart");
        let no_frame = |folder: &Path| {
            let label = folder.join("01-part/test/label0");
            std::fs::remove_dir_all(&label).unwrap();
            std::fs::create_dir(label).unwrap();
        };
        assert!(message(&no_frame).starts_with("DIR/01-part/test/label0 holds no frame; "));
    }
}
