//! CelebA as it is published: `img_align_celeba/*.jpg`, `list_attr_celeba.txt`, `list_eval_partition.txt`.
//!
//! The method's publication does not say how it cut CelebA into periods. Here: four periods of people who look alike, young women,
//! young men, other women, other men (attributes Male and Young), and the label is the hair's colour, of those with exactly one of
//! Black_Hair, Blond_Hair, Brown_Hair and Gray_Hair. The published partition says who trains (0) and who is tested (2); the
//! validation images (1) are left out, and so is a colour that one half of a period lacks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{Found, FoundPeriod, StreamError, read_text};

const IMAGES: &str = "img_align_celeba";
const ATTRIBUTES: &str = "list_attr_celeba.txt";
const PARTITION: &str = "list_eval_partition.txt";
/// Name, Male, Young.
const PERIODS: [(&str, bool, bool); 4] = [
    ("01-young-women", false, true),
    ("02-young-men", true, true),
    ("03-women", false, false),
    ("04-men", true, false),
];
const COLOURS: [&str; 4] = ["Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair"];
const LAYOUT: &str =
    "CelebA is DIR/img_align_celeba/*.jpg, DIR/list_attr_celeba.txt and DIR/list_eval_partition.txt";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Half {
    Train,
    Validation,
    Test,
}

pub(super) fn find(root: &Path) -> Result<Vec<FoundPeriod>, StreamError> {
    let halves = partition(&root.join(PARTITION))?;
    let mut periods =
        PERIODS.map(|(name, ..)| FoundPeriod { name: name.to_owned(), train: Vec::new(), test: Vec::new() });
    let path = root.join(ATTRIBUTES);
    let text = read_text(&path)?;
    let mut lines =
        text.lines().enumerate().map(|(index, line)| Line { path: &path, number: index + 1, line });
    let names = header(&path, &mut lines)?;
    for line in lines.filter(|line| !line.line.trim().is_empty()) {
        let (image, attributes) = line.attributes(&names)?;
        let half = halves.get(image).ok_or_else(|| line.error(format!("{image} is not in {PARTITION}")))?;
        let mut colours = COLOURS.iter().filter(|colour| attributes.contains(*colour));
        let (Some(colour), None) = (colours.next(), colours.next()) else { continue };
        let group = (attributes.contains("Male"), attributes.contains("Young"));
        let file = root.join(IMAGES).join(image);
        if !file.is_file() {
            return Err(line.error(format!("there is no {}", file.display())));
        }
        let found = Found { label: (*colour).to_owned(), path: file };
        let place = PERIODS.iter().position(|(_, male, young)| group == (*male, *young));
        let period = &mut periods[place.expect("both attributes have both values among the periods")];
        match half {
            Half::Train => period.train.push(found),
            Half::Test => period.test.push(found),
            Half::Validation => {}
        }
    }
    periods.into_iter().map(|period| with_shared_labels(root, period)).collect()
}

/// Leaves out what only one half has.
fn with_shared_labels(root: &Path, mut period: FoundPeriod) -> Result<FoundPeriod, StreamError> {
    let labels = |frames: &[Found]| frames.iter().map(|frame| frame.label.clone()).collect::<BTreeSet<_>>();
    let (trained, tested) = (labels(&period.train), labels(&period.test));
    let shared: BTreeSet<String> = trained.intersection(&tested).cloned().collect();
    if shared.is_empty() {
        let what = "frame to train on and to test on for each period";
        return Err(StreamError::Empty { path: root.join(ATTRIBUTES), what, layout: LAYOUT });
    }
    period.train.retain(|frame| shared.contains(&frame.label));
    period.test.retain(|frame| shared.contains(&frame.label));
    Ok(period)
}

struct Line<'a> {
    path: &'a Path,
    number: usize,
    line: &'a str,
}

impl<'a> Line<'a> {
    fn error(&self, problem: String) -> StreamError {
        StreamError::Line { path: self.path.to_owned(), line: self.number, problem }
    }

    /// The image's name, and the attributes that it has.
    fn attributes(&self, names: &[&'a str]) -> Result<(&'a str, BTreeSet<&'a str>), StreamError> {
        let mut words = self.line.split_whitespace();
        let image = words.next().unwrap_or_default();
        let values: Vec<&str> = words.collect();
        if values.len() != names.len() {
            return Err(self.error(format!(
                "{image} has {} values for {} attributes",
                values.len(),
                names.len()
            )));
        }
        let mut has = BTreeSet::new();
        for (name, value) in names.iter().zip(values) {
            match value {
                "1" => drop(has.insert(*name)),
                "-1" => {}
                _ => return Err(self.error(format!("{name} of {image} is {value:?}, neither 1 nor -1"))),
            }
        }
        Ok((image, has))
    }
}

/// The attributes' names, behind a line that counts the images.
fn header<'a>(path: &Path, lines: &mut impl Iterator<Item = Line<'a>>) -> Result<Vec<&'a str>, StreamError> {
    let empty = || StreamError::Empty { path: path.to_owned(), what: "attributes", layout: LAYOUT };
    lines.next().ok_or_else(empty)?;
    let line = lines.next().ok_or_else(empty)?;
    let names: Vec<&str> = line.line.split_whitespace().collect();
    for needed in COLOURS.iter().chain(&["Male", "Young"]) {
        if !names.contains(needed) {
            return Err(line.error(format!("there is no attribute {needed}")));
        }
    }
    Ok(names)
}

fn partition(path: &Path) -> Result<BTreeMap<String, Half>, StreamError> {
    let text = read_text(path)?;
    let mut halves = BTreeMap::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line = Line { path, number: index + 1, line };
        let half = match line.line.split_whitespace().collect::<Vec<_>>()[..] {
            [image, "0"] => (image, Half::Train),
            [image, "1"] => (image, Half::Validation),
            [image, "2"] => (image, Half::Test),
            _ => return Err(line.error(format!("{:?} is not an image and 0, 1 or 2", line.line))),
        };
        halves.insert(half.0.to_owned(), half.1);
    }
    Ok(halves)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{read, summary, write_files};
    use super::super::{Source, Stream};
    use super::*;

    const NAMES: &str = "Bald Black_Hair Blond_Hair Brown_Hair Gray_Hair Male Young";

    /// (attributes that an image has, its part)
    const PEOPLE: [(&str, &str); 20] = [
        ("Black_Hair Young", "0"),
        ("Black_Hair Young", "2"),
        ("Blond_Hair Young", "0"),
        ("Blond_Hair Young", "2"),
        ("Black_Hair Male Young", "0"),
        ("Black_Hair Male Young", "2"),
        ("Brown_Hair Male Young", "0"),
        ("Brown_Hair Male Young", "2"),
        ("Gray_Hair", "0"),
        ("Gray_Hair", "2"),
        ("Blond_Hair", "0"),
        ("Blond_Hair", "2"),
        ("Gray_Hair Male", "0"),
        ("Gray_Hair Male", "2"),
        ("Black_Hair Male", "0"),
        ("Black_Hair Male", "2"),
        // Left out: two colours, none, the validation part, a colour that is not tested.
        ("Black_Hair Brown_Hair Young", "0"),
        ("Bald Male", "0"),
        ("Black_Hair Young", "1"),
        ("Gray_Hair Young", "0"),
    ];

    fn write(folder: &Path, names: &str) {
        let names: Vec<&str> = names.split(' ').collect();
        let mut attributes = format!("{}\n{} \n", PEOPLE.len(), names.join(" "));
        let mut partition = String::new();
        for (number, (has, part)) in (1..).zip(PEOPLE) {
            let values: Vec<&str> = names
                .iter()
                .map(|name| if has.split(' ').any(|one| one == *name) { " 1" } else { "-1" })
                .collect();
            attributes += &format!("{number:06}.jpg {}\n", values.join(" "));
            partition += &format!("{number:06}.jpg {part}\n");
            write_files(folder, &[(&format!("{IMAGES}/{number:06}.jpg"), "x")]);
        }
        write_files(folder, &[(ATTRIBUTES, &attributes), (PARTITION, &partition)]);
    }

    fn read_celeba(folder: &Path) -> Result<Stream, String> {
        read(folder, Source::CelebA(folder.into()))
    }

    #[test]
    fn people_are_grouped_and_labelled_by_their_attributes() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), NAMES);
        let stream = read_celeba(folder.path()).unwrap();
        let labels = |names: [&str; 2]| names.map(str::to_owned).to_vec();
        assert_eq!(
            summary(&stream),
            [
                ("01-young-women".into(), 2, 4, labels(["Black_Hair", "Blond_Hair"])),
                ("02-young-men".into(), 2, 4, labels(["Black_Hair", "Brown_Hair"])),
                ("03-women".into(), 2, 4, labels(["Blond_Hair", "Gray_Hair"])),
                ("04-men".into(), 2, 4, labels(["Black_Hair", "Gray_Hair"])),
            ]
        );
        assert_eq!(&*stream.periods[0].frames.meta(2).stream_id, "img_align_celeba/000002.jpg");
    }

    #[test]
    fn what_is_missing_or_wrong_is_named_with_its_line() {
        let message = |change: &dyn Fn(&Path)| {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), NAMES);
            change(folder.path());
            read_celeba(folder.path()).err().expect("an error")
        };
        let remove =
            |name: &'static str| move |folder: &Path| std::fs::remove_file(folder.join(name)).unwrap();
        let replace = |name: &'static str, from: &'static str, to: &'static str| {
            move |folder: &Path| {
                let text = std::fs::read_to_string(folder.join(name)).unwrap();
                std::fs::write(folder.join(name), text.replacen(from, to, 1)).unwrap();
            }
        };
        assert!(message(&remove(ATTRIBUTES)).starts_with("DIR/list_attr_celeba.txt can't be read"));
        assert!(message(&remove(PARTITION)).starts_with("DIR/list_eval_partition.txt can't be read"));
        assert_eq!(
            message(&remove("img_align_celeba/000003.jpg")),
            "DIR/list_attr_celeba.txt, line 5: there is no DIR/img_align_celeba/000003.jpg"
        );
        assert_eq!(
            message(&replace(ATTRIBUTES, "Young", "Old")),
            "DIR/list_attr_celeba.txt, line 2: there is no attribute Young"
        );
        assert_eq!(
            message(&replace(ATTRIBUTES, "000001.jpg -1", "000001.jpg 0")),
            "DIR/list_attr_celeba.txt, line 3: Bald of 000001.jpg is \"0\", neither 1 nor -1"
        );
        assert_eq!(
            message(&replace(ATTRIBUTES, "000002.jpg -1", "000002.jpg")),
            "DIR/list_attr_celeba.txt, line 4: 000002.jpg has 6 values for 7 attributes"
        );
        assert_eq!(
            message(&replace(PARTITION, "000004.jpg 2", "000004.jpg 3")),
            "DIR/list_eval_partition.txt, line 4: \"000004.jpg 3\" is not an image and 0, 1 or 2"
        );
        assert_eq!(
            message(&replace(PARTITION, "000004.jpg 2\n", "")),
            "DIR/list_attr_celeba.txt, line 6: 000004.jpg is not in list_eval_partition.txt"
        );
    }
}
