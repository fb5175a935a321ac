//! ImageNet (ILSVRC 2012) as it is published: `train/WNID/*.JPEG`, and `val/` with a folder a class or, as Kaggle packs it, without
//! folders and with `LOC_val_solution.csv` beside it.
//!
//! Classes are dealt out to periods in a keyed order, the same everywhere; the validation images are those to test on.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Found, FoundPeriod, StreamError, entries, folders, images, name, read_text};
use crate::train::rng::{Domain, permutation};

/// Keys the order of classes; another value gives another, equally good one.
const ORDER_SEED: u64 = 0;
const SOLUTION: &str = "LOC_val_solution.csv";
const LAYOUT: &str = "ImageNet is DIR/train/WNID/*.JPEG and DIR/val/WNID/*.JPEG (or DIR/val/*.JPEG with DIR/LOC_val_solution.csv)";

pub(super) fn find(root: &Path, periods: usize) -> Result<Vec<FoundPeriod>, StreamError> {
    let train = by_class(&root.join("train"))?;
    let mut test = match folders(&root.join("val"))?.is_empty() {
        false => by_class(&root.join("val"))?,
        true => by_solution(root)?,
    };
    let classes: Vec<String> = train.keys().cloned().collect();
    if periods == 0 || classes.len() < 2 * periods {
        return Err(StreamError::Periods { classes: classes.len(), periods });
    }
    let order = permutation(ORDER_SEED, Domain::Order, 0, classes.len() as u32);
    let mut train = train;
    let period = |index: usize| {
        // As even as they can be.
        let dealt = index * classes.len() / periods..(index + 1) * classes.len() / periods;
        let dealt = || order[dealt.clone()].iter().map(|class| &classes[*class as usize]);
        let take = |from: &mut BTreeMap<String, Vec<Found>>| -> Vec<Found> {
            dealt().flat_map(|class| from.remove(class).unwrap_or_default()).collect()
        };
        FoundPeriod {
            name: format!("{:02}-classes", index + 1),
            train: take(&mut train),
            test: take(&mut test),
        }
    };
    Ok((0..periods).map(period).collect())
}

fn by_class(folder: &Path) -> Result<BTreeMap<String, Vec<Found>>, StreamError> {
    let mut classes = BTreeMap::new();
    for class in folders(folder)? {
        let label = name(&class);
        let found = images(&class, &label)?;
        if found.is_empty() {
            return Err(StreamError::Empty { path: class, what: "image", layout: LAYOUT });
        }
        classes.insert(label, found);
    }
    if classes.is_empty() {
        return Err(StreamError::Empty { path: folder.to_owned(), what: "class", layout: LAYOUT });
    }
    Ok(classes)
}

/// `ImageId,PredictionString`, where a prediction begins with the image's class.
fn by_solution(root: &Path) -> Result<BTreeMap<String, Vec<Found>>, StreamError> {
    let (folder, solution) = (root.join("val"), root.join(SOLUTION));
    if entries(&folder)?.is_empty() {
        return Err(StreamError::Empty { path: folder, what: "image", layout: LAYOUT });
    }
    let mut classes = BTreeMap::<String, Vec<Found>>::new();
    for (index, line) in read_text(&solution)?.lines().enumerate().skip(1) {
        let problem =
            |problem: String| StreamError::Line { path: solution.clone(), line: index + 1, problem };
        let (image, rest) = line
            .split_once(',')
            .ok_or_else(|| problem(format!("{line:?} is not ImageId,PredictionString")))?;
        let label = rest.split_whitespace().next().ok_or_else(|| problem(format!("{image} has no class")))?;
        let path = folder.join(format!("{image}.JPEG"));
        if !path.is_file() {
            return Err(problem(format!("there is no {}", path.display())));
        }
        classes.entry(label.to_owned()).or_default().push(Found { label: label.to_owned(), path });
    }
    Ok(classes)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{read, summary, write_files};
    use super::super::{Source, Stream};
    use super::*;

    fn write_train(folder: &Path, classes: usize) {
        for class in 0..classes {
            for image in 0..3 {
                let name = format!("train/n{class:08}/n{class:08}_{image}.JPEG");
                write_files(folder, &[(&name, "x")]);
            }
        }
    }

    fn read_imagenet(folder: &Path, periods: usize) -> Result<Stream, String> {
        read(folder, Source::ImageNet { folder: folder.into(), periods })
    }

    #[test]
    fn classes_are_dealt_out_evenly_and_each_once() {
        let folder = tempfile::tempdir().unwrap();
        write_train(folder.path(), 7);
        for class in 0..7 {
            write_files(folder.path(), &[(&format!("val/n{class:08}/ILSVRC2012_val_{class:08}.JPEG"), "y")]);
        }
        let stream = read_imagenet(folder.path(), 3).unwrap();
        let found = summary(&stream);
        let counts: Vec<(&str, usize, usize, usize)> = found
            .iter()
            .map(|(name, train, all, labels)| (name.as_str(), *train, *all, labels.len()))
            .collect();
        assert_eq!(counts, [("01-classes", 6, 8, 2), ("02-classes", 6, 8, 2), ("03-classes", 9, 12, 3)]);
        let mut labels: Vec<String> = found.into_iter().flat_map(|(.., labels)| labels).collect();
        assert!(!labels.is_sorted(), "in a keyed order");
        labels.sort();
        assert_eq!(labels, (0..7).map(|class| format!("n{class:08}")).collect::<Vec<_>>());
    }

    #[test]
    fn validation_images_without_folders_get_their_classes_from_the_solution() {
        let folder = tempfile::tempdir().unwrap();
        write_train(folder.path(), 2);
        let solution = "ImageId,PredictionString\nILSVRC2012_val_1,n00000001 1 2 3 4 \nILSVRC2012_val_2,n00000000 5 6 7 8 n00000000 1 1 2 2 \n";
        write_files(
            folder.path(),
            &[(SOLUTION, solution), ("val/ILSVRC2012_val_1.JPEG", "1"), ("val/ILSVRC2012_val_2.JPEG", "2")],
        );
        let stream = read_imagenet(folder.path(), 1).unwrap();
        let period = &stream.periods[0];
        assert_eq!((period.train, &period.labels[6..]), (6, &[0, 1][..]));
        assert_eq!(&*period.frames.meta(6).stream_id, "val/ILSVRC2012_val_2.JPEG");
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let message = |periods: usize, change: &dyn Fn(&Path)| {
            let folder = tempfile::tempdir().unwrap();
            write_train(folder.path(), 2);
            write_files(folder.path(), &[("val/n00000000/a.JPEG", "x"), ("val/n00000001/b.JPEG", "x")]);
            change(folder.path());
            read_imagenet(folder.path(), periods).err().expect("an error")
        };
        let remove =
            |name: &'static str| move |folder: &Path| std::fs::remove_dir_all(folder.join(name)).unwrap();
        assert_eq!(message(2, &|_| ()), "2 classes are too few for 2 periods of two or more");
        assert!(message(1, &remove("train")).starts_with("DIR/train can't be read"));
        assert!(message(1, &remove("val")).starts_with("DIR/val can't be read"));
        assert_eq!(
            message(1, &remove("val/n00000001")),
            "01-classes has the label \"n00000001\" in its train frames alone"
        );
        let empty = |folder: &Path| std::fs::remove_file(folder.join("val/n00000001/b.JPEG")).unwrap();
        assert!(message(1, &empty).starts_with("DIR/val/n00000001 holds no image; ImageNet is"));
        let flat = |folder: &Path| {
            std::fs::remove_dir_all(folder.join("val")).unwrap();
            write_files(folder, &[("val/ILSVRC2012_val_1.JPEG", "x")]);
        };
        assert!(message(1, &flat).starts_with("DIR/LOC_val_solution.csv can't be read"));
        let wrong = |folder: &Path| {
            flat(folder);
            write_files(
                folder,
                &[(SOLUTION, "ImageId,PredictionString\nILSVRC2012_val_2,n00000000 1 2 3 4\n")],
            );
        };
        assert_eq!(
            message(1, &wrong),
            "DIR/LOC_val_solution.csv, line 2: there is no DIR/val/ILSVRC2012_val_2.JPEG"
        );
    }
}
