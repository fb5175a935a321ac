use super::*;

fn parse(text: &str, variables: &[(&str, &str)]) -> Result<Config, Vec<String>> {
    let variables: Vec<(String, String)> =
        variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    let sources = Sources {
        file: Some(("p.toml", text)),
        variables: &variables,
        read_secret: &|path| match path.to_str() {
            Some("/run/token") => Ok("0123456789abcdef\n".into()),
            Some("/run/short") => Ok("abc\n".into()),
            _ => Err(io::Error::from(io::ErrorKind::NotFound)),
        },
    };
    Config::parse(&sources).map_err(|problems| problems.0.iter().map(Problem::to_string).collect())
}

fn mistakes(text: &str) -> Vec<String> {
    parse(text, &[]).expect_err("the text has mistakes")
}

/// With `PALIMPSEST_WRITE_MANUAL=1` it writes the file instead of comparing.
#[test]
fn the_manual_on_disk_is_the_one_that_the_schema_makes() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/config/default.toml");
    if std::env::var_os("PALIMPSEST_WRITE_MANUAL").is_some() {
        std::fs::write(path, Config::manual()).unwrap();
    }
    let text = std::fs::read_to_string(path).unwrap();
    assert!(
        text == Config::manual(),
        "run this test with PALIMPSEST_WRITE_MANUAL=1 and look at the difference"
    );
}

#[test]
fn the_manual_reads_as_the_defaults() {
    assert_eq!(parse(&Config::manual(), &[]), Ok(Config::default()));
    assert_eq!(parse("", &[]), Ok(Config::default()));
}

#[test]
fn the_manual_has_every_key_and_says_what_it_does() {
    let manual = Config::manual();
    for entry in Config::default().entries() {
        let lines = [format!("\n{} = ", entry.key), format!("\n# {} =", entry.key)];
        assert!(lines.iter().any(|line| manual.contains(line)), "{}", entry.key);
        assert!((1..=3).contains(&entry.doc.len()), "{}.{}", entry.section, entry.key);
    }
    assert!(manual.lines().all(|line| line.len() <= 130), "a line of the manual is too long");
}

#[test]
fn what_is_shown_reads_back() {
    let text =
        "[model]\ninit = \"w.safetensors\"\n[kafka]\nproperties = { \"security.protocol\" = \"ssl\" }\n";
    let config = parse(text, &[]).unwrap();
    assert_eq!(parse(&config.show(), &[]), Ok(config));
}

#[test]
fn five_mistakes_give_five_messages() {
    let text = r#"
[train]
btach = 64
batch = "many"
lambda = -1
[period]
length = "1 week"
[kfaka]
brokers = ["b:9092"]
"#;
    assert_eq!(
        mistakes(text),
        [
            "p.toml:3: unknown key train.btach, did you mean train.batch?",
            "p.toml:4: train.batch = \"many\", should be an integer from 2 to 65536",
            "p.toml:5: train.lambda = -1, should be a number above 0.0 and up to 1000.0",
            "p.toml:7: period.length = \"1 week\", should be a duration (\"500ms\", \"30s\", \"10m\", \"6h\", \"1d\") \
             from \"1s\" to \"366d\"",
            "p.toml:9: unknown section [kfaka], did you mean [kafka]?",
        ]
    );
}

#[test]
fn a_broken_line_hides_no_other_mistake() {
    let found = mistakes("[train]\nbatch = 1 2\n[log]\nformat = \"xml\"\n");
    assert!(found.iter().any(|line| line.starts_with("p.toml:2: not TOML: ")), "{found:?}");
    assert!(found.iter().any(|line| line.starts_with("p.toml:4: log.format = \"xml\"")), "{found:?}");
}

#[test]
fn a_variable_wins_over_the_file_and_is_named_when_wrong() {
    let text = "[train]\nbatch = 32\n";
    let config = parse(text, &[("PALIMPSEST__TRAIN__BATCH", "64"), ("PALIMPSEST_ABORT_AT", "x")]).unwrap();
    assert_eq!(config.train.batch, 64);
    let wrong =
        parse(text, &[("PALIMPSEST__TRAIN__BATCH", "1"), ("PALIMPSEST__TRAIN__STEP", "5")]).unwrap_err();
    assert_eq!(
        wrong,
        [
            "PALIMPSEST__TRAIN__BATCH: train.batch = 1, should be an integer from 2 to 65536",
            "PALIMPSEST__TRAIN__STEP: unknown key train.step, did you mean train.steps?",
        ]
    );
}

#[test]
fn variables_can_hold_lists_durations_and_paths() {
    let variables = [
        ("PALIMPSEST__KAFKA__BROKERS", "a:1, b:2"),
        ("PALIMPSEST__KAFKA__TOPICS", "[\"x\", \"y\"]"),
        ("PALIMPSEST__PERIOD__LENGTH", "6h"),
        ("PALIMPSEST__INGEST__SEGMENT_BYTES", "1MiB"),
        ("PALIMPSEST__MODEL__MEAN", "[0.5, 0.5, 0.5]"),
        ("PALIMPSEST__PIPELINE__NAME", "42"),
        ("PALIMPSEST__KAFKA__PROPERTIES__SECURITY_PROTOCOL", "ssl"),
    ];
    let config = parse("[kafka.properties]\nclient.id = \"p\"\n", &variables).unwrap();
    assert_eq!(config.kafka.brokers, ["a:1", "b:2"]);
    assert_eq!(config.kafka.topics, ["x", "y"]);
    assert_eq!(config.period.length, Span::from_hours(6));
    assert_eq!(config.ingest.segment_bytes, ByteSize::from_mib(1));
    assert_eq!(config.model.mean, [0.5; 3]);
    assert_eq!(config.pipeline.name, "42");
    let settings: Vec<_> = config.kafka.properties.settings().collect();
    assert_eq!(settings, [("client.id", "p"), ("security.protocol", "ssl")]);
}

#[test]
fn an_empty_variable_takes_an_optional_value_away() {
    let config = parse("[kafka]\ngroup = \"g\"\n", &[("PALIMPSEST__KAFKA__GROUP", "")]).unwrap();
    assert_eq!(config.consumer_group(), "palimpsest-main");
}

#[test]
fn durations_and_sizes_are_shown_in_the_unit_they_were_meant_in() {
    for (ms, text) in [(0, "0s"), (500, "500ms"), (90_000, "90s"), (600_000, "10m"), (86_400_000, "1d")] {
        assert_eq!(Span::from_ms(ms).to_string(), text);
        let config = parse(&format!("[ingest]\nmax_ahead = \"{text}\"\n"), &[]).unwrap();
        assert_eq!(config.ingest.max_ahead, Span::from_ms(ms));
    }
    assert_eq!(ByteSize::from_kib(1536).to_string(), "1536KiB");
}

#[test]
fn a_number_without_a_unit_is_no_duration() {
    let found = mistakes("[idle]\ntimeout = 30\n");
    assert!(found[0].starts_with("p.toml:2: idle.timeout = 30, should be a duration"), "{found:?}");
}

#[test]
fn rules_between_keys_name_both() {
    let text = r#"
[period]
min_frames = 100
max_frames = 50
[model]
image_size = 60
[probe]
k = 8
max_frames = 8
guard = "5m"
[ingest]
max_frame_bytes = "64MiB"
[kafka]
dead_letter_topic = "frames"
properties = { "group.id" = "mine" }
[gate]
max_forgetting_cumulative = 0.01
"#;
    let found = mistakes(text);
    for expected in [
        "p.toml:3: period.min_frames = 100, should be at least 512, 4 x train.batch (128)",
        "p.toml:4: period.max_frames = 50, should be at least period.min_frames (100)",
        "p.toml:6: model.image_size = 60, should be a multiple of model.patch_size (8)",
        "p.toml:8: probe.k = 8, should be below probe.max_frames (8)",
        "p.toml:10: probe.guard = \"5m\", should be less than half of probe.block (10m)",
        "p.toml:12: ingest.max_frame_bytes = \"64MiB\", should be at most ingest.max_record_bytes (32MiB)",
        "p.toml:15: kafka.properties.group.id = \"mine\", should be kafka.group in its place",
        "p.toml:17: gate.max_forgetting_cumulative = 0.01, should be at least gate.max_forgetting_parent (0.05)",
    ] {
        assert!(found.iter().any(|line| line == expected), "{expected}\nnot in {found:#?}");
    }
    assert_eq!(found.len(), 9, "{found:#?}");
}

#[test]
fn a_librdkafka_setting_that_would_be_overridden_is_refused_with_its_reason() {
    for (property, instead) in [
        ("enable.auto.commit", "absent: positions live in the registry"),
        ("enable.idempotence", "absent: dead letters are always sent with it"),
        ("partition.assignment.strategy", "absent: it is cooperative-sticky"),
        ("topic.metadata.refresh.interval.ms", "absent: new partitions are looked for every 30 s"),
    ] {
        let found = mistakes(&format!("[kafka.properties]\n\"{property}\" = \"x\"\n"));
        let expected = format!("p.toml:1: kafka.properties.{property} = \"x\", should be {instead}");
        assert_eq!(found, [expected]);
    }
}

#[test]
fn a_rule_is_silent_about_a_key_that_is_wrong_by_itself() {
    assert_eq!(mistakes("[train]\nbatch = 0\n[period]\nmin_frames = 8\n").len(), 1);
}

#[test]
fn a_patch_size_matters_to_a_vit_only() {
    assert!(parse("[model]\narchitecture = \"resnet_small\"\nimage_size = 36\n", &[]).is_ok());
}

#[test]
fn only_a_vit_learns_from_a_batch_in_parts() {
    let text =
        |architecture| format!("[model]\narchitecture = \"{architecture}\"\n[train]\nmicro_batch = 16\n");
    assert!(parse(&text("vit_tiny"), &[]).is_ok());
    let expected =
        "p.toml:4: train.micro_batch = 16, should be 0 with resnet18, which normalises by the whole batch";
    assert_eq!(mistakes(&text("resnet18")), [expected]);
}

#[test]
fn secrets_are_never_printed() {
    let text = r#"
[serve]
token = "very-secret-token-1"
[kafka.properties]
sasl.password = "very-secret-2"
"sasl.username" = "user"
"#;
    let config = parse(text, &[]).unwrap();
    for printed in [config.show(), format!("{config:?}")] {
        assert!(!printed.contains("very-secret"), "{printed}");
    }
    assert!(config.show().contains("\"sasl.username\" = \"user\""));
    assert_eq!(config.serve.token.unwrap().expose(), "very-secret-token-1");
    let wrong = r#"
[serve]
token = "short-secret"
tokn = "very-secret-3"
[registry]
url = "postgres//me:secret-4@db/x?password=secret-5"
"#;
    let found = mistakes(wrong).join("\n");
    assert_eq!(mistakes(wrong).len(), 3);
    assert!(!found.contains("secret-"), "{found}");
}

#[test]
fn a_token_can_stand_in_a_file_of_its_own() {
    let config = parse("[serve]\ntoken_file = \"/run/token\"\n", &[]).unwrap();
    assert_eq!(config.serve.token.as_ref().unwrap().expose(), "0123456789abcdef");
    assert!(config.show().contains("token_file = \"/run/token\"\n") && !config.show().contains("token ="));
    for (text, expected) in [
        ("token_file = \"/run/short\"", "should be a file that holds 16 to 512 visible ASCII characters"),
        ("token_file = \"/none\"", "should be a file that can be read (entity not found)"),
        (
            "token_file = \"/run/token\"\ntoken = \"0123456789abcdef\"",
            "should be not set where serve.token is",
        ),
    ] {
        let found = mistakes(&format!("[serve]\n{text}\n"));
        assert!(found.len() == 1 && found[0].ends_with(expected), "{found:?}");
    }
}

#[test]
fn a_librdkafka_setting_can_come_from_a_file() {
    let config = parse("[kafka.properties]\n\"sasl.password_file\" = \"/run/token\"\n", &[]).unwrap();
    let settings: Vec<_> = config.kafka.properties.settings().collect();
    assert_eq!(settings, [("sasl.password", "0123456789abcdef")]);
    assert!(config.show().contains("properties = { \"sasl.password_file\" = \"/run/token\" }"));
}

#[test]
fn a_section_that_is_no_table_is_told_as_such() {
    assert_eq!(mistakes("train = 5\n"), ["p.toml:1: train = 5, should be a table, [train]"]);
    assert_eq!(mistakes("batch = 5\n"), ["p.toml:1: unknown key batch, did you mean train.batch?"]);
}

#[test]
fn urls_of_stores_that_nobody_can_open_are_refused() {
    for url in ["ftp://x", "s3://", "file://data", ""] {
        assert_eq!(mistakes(&format!("[store]\nurl = \"{url}\"\n")).len(), 1, "{url}");
    }
    for url in ["data", "/data", "file:///data", "s3://bucket/a", "az://c", "gs://b"] {
        assert!(parse(&format!("[store]\nurl = \"{url}\"\n"), &[]).is_ok(), "{url}");
    }
}

#[test]
fn a_file_that_is_not_there_is_a_problem() {
    let problems = Config::load(Some(Path::new("/nowhere/p.toml"))).unwrap_err();
    assert!(problems.to_string().starts_with("/nowhere/p.toml: can't be read: "), "{problems}");
}
