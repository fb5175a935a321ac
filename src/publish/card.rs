//! `README.md` of a version: the manifest's measures for people who don't read JSON.
//!
//! A pure function of the manifest, so that it can be written anew for a redacted one.

use std::fmt::Write;

use super::manifest::{ByProbe, Manifest, Probe};

/// The card in Markdown.
pub fn card(manifest: &Manifest) -> String {
    let mut text = String::new();
    head(&mut text, manifest);
    scores(&mut text, manifest);
    shape(&mut text, manifest);
    files(&mut text, manifest);
    text
}

// Writing to a String can't fail, so the results of `writeln!` are dropped throughout.

fn head(text: &mut String, manifest: &Manifest) {
    let Manifest { version, pipeline, training, gate, .. } = manifest;
    let parent =
        manifest.parent.map_or("nothing: it starts a lineage".to_owned(), |parent| parent.to_string());
    let _ = writeln!(text, "# {pipeline} {version}\n");
    let _ = writeln!(text, "An image embedding, distilled from {parent}.\n");
    let _ = writeln!(text, "| | |\n|---|---|");
    for period in &manifest.periods {
        let _ = writeln!(
            text,
            "| period | {}: {} to {}, {} frames |",
            period.id, period.start, period.end, period.frames
        );
    }
    let _ = writeln!(
        text,
        "| training | {} frames ({} copies and {} that are like a probe frame left out), {} steps, {:.0} s on {} |",
        training.frames,
        training.left_out.copies,
        training.left_out.near_probe,
        training.steps,
        training.seconds,
        manifest.device
    );
    let reason = gate.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
    let _ = writeln!(text, "| gate | {}{reason} |", gate.verdict);
    let _ = writeln!(
        text,
        "| published | {} by palimpsest {} |\n",
        manifest.published_at, manifest.program_version
    );
}

fn scores(text: &mut String, manifest: &Manifest) {
    let metrics = &manifest.metrics;
    let _ = writeln!(text, "## Accuracy and forgetting, in per cent\n");
    let _ = writeln!(
        text,
        "On frames of each period that were never trained on. Forgetting: best ancestor minus this version.\n"
    );
    let _ = writeln!(
        text,
        "| period | frames | kNN | linear | 10-shot | forgotten kNN | linear | 10-shot |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    );
    for probe in &metrics.probes {
        let Probe { period, frames, accuracy, forgetting, .. } = probe;
        let _ = writeln!(text, "| {period} | {frames} | {} | {} |", percents(accuracy), percents(forgetting));
    }
    let (accuracy, forgetting) = (percents(&metrics.average_accuracy), percents(&metrics.average_forgetting));
    let _ = writeln!(text, "| **average** | | {accuracy} | {forgetting} |\n");
    let _ = writeln!(
        text,
        "Backward transfer (kNN, linear, 10-shot): {}.\n",
        percents(&metrics.backward_transfer).replace(" |", ",")
    );
}

fn shape(text: &mut String, manifest: &Manifest) {
    let _ = writeln!(text, "## Without labels\n");
    let _ = writeln!(
        text,
        "| period | effective rank | alignment | uniformity | drift from | CKA | neighbour overlap | neighbour retention | recoverable R² | \
         neighbour retention from the parent (95 %) |\n|---|--:|--:|--:|---|--:|--:|--:|--:|--:|"
    );
    for probe in &manifest.metrics.probes {
        let drift = match &probe.drift {
            Some(drift) => format!(
                "{} | {:.3} | {:.3} | {} | {}",
                drift.against,
                drift.cka,
                drift.neighbour_overlap,
                number(drift.neighbour_retention),
                number(drift.recoverability)
            ),
            None => "– | – | – | – | –".to_owned(),
        };
        let retention = probe.parent_retention.map_or("–".to_owned(), |retention| {
            format!("{:.3} ({:.3} to {:.3})", retention.estimate, retention.lower, retention.upper)
        });
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {drift} | {retention} |",
            probe.period,
            probe.effective_rank.map_or("–".to_owned(), |rank| format!("{rank:.1}")),
            number(probe.alignment),
            number(probe.uniformity)
        );
    }
    let metrics = &manifest.metrics;
    let _ = writeln!(
        text,
        "\nContrastive loss on the new period: {}, before training {}.\n",
        number(metrics.contrastive_loss),
        number(metrics.reference_contrastive_loss)
    );
}

fn files(text: &mut String, manifest: &Manifest) {
    let _ = writeln!(text, "## Files\n\n| file | bytes | SHA-256 |\n|---|--:|---|");
    // The card can't state its own hash.
    for file in manifest.files.iter().filter(|file| file.path != super::file::CARD) {
        let _ = writeln!(text, "| `{}` | {} | `{}` |", file.path, file.bytes, file.sha256);
    }
}

fn percents(scores: &ByProbe) -> String {
    let percent =
        |score: Option<f64>| score.map_or("–".to_owned(), |score| format!("{:.1}", score * 100.0));
    [scores.knn, scores.linear, scores.few_shot].map(percent).join(" | ")
}

fn number(value: Option<f64>) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish::manifest::tests::example;

    #[test]
    fn the_card_states_scores_drift_and_files() {
        let text = card(&example());
        for line in [
            "# main v000002",
            "An image embedding, distilled from v000001.",
            "| 20260131T000000Z | 200 | 87.0 | 89.0 | – | 3.0 | 5.0 | – |",
            "| **average** | | 88.0 | 90.0 | – | 3.0 | 5.0 | – |",
            "Backward transfer (kNN, linear, 10-shot): -3.0, -1.0, –.",
            "| 20260131T000000Z | 31.4 | – | -2.500 | v000001 | 0.921 | 0.640 | 0.970 | 0.800 | 0.970 (0.950 to 0.980) |",
            "| gate | accepted |",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} in\n{text}");
        }
        assert!(text.contains("| `encoder.safetensors` | 1234567 |"));
    }

    #[test]
    fn the_rows_of_a_table_have_as_many_cells_as_its_head() {
        let text = card(&example());
        for block in text.split("\n\n").filter(|block| block.contains("|---")) {
            let cells: Vec<usize> = block.lines().map(|line| line.matches('|').count()).collect();
            assert!(cells.windows(2).all(|pair| pair[0] == pair[1]), "{block}");
        }
    }
}
