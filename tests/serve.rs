//! The HTTP interface over a real registry, a real store and a real (small, untrained) encoder.

use std::collections::BTreeSet;
use std::io::Cursor;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Method, Request, StatusCode};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use candle_core::Device;
use futures::FutureExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use palimpsest::eval::gate::Reason;
use palimpsest::metrics::{GATE_REASONS, HTTP_REQUESTS, ROUTES};
use palimpsest::model::{Architecture, EncoderSpec, Weights};
use palimpsest::publish::encoder_config::{Preprocessing, encoder_config};
use palimpsest::registry::sqlite::SqliteRegistry;
use palimpsest::registry::{Flush, Lineage, PeriodBounds, PeriodState, Publication, Registry, SegmentRecord};
use palimpsest::serve::{Check, Embedder, Limits, Parts, Token, router};
use palimpsest::store::paths::Paths;
use palimpsest::store::{Op, Store};
use palimpsest::types::{EventTime, FileRef, OffsetRange, PeriodId, Sha256, TopicPartition, Version};

const TOKEN: &str = "0123456789abcdef";
const MANIFEST: &str = "{\n  \"schema\": 1,\n  \"version\": \"v000001\"\n}\n";
const NOW: EventTime = EventTime(5_000_000);
const DIMENSION: usize = 96;

/// One published version, `v000001`, which `latest` names.
struct World {
    router: Router,
    registry: Arc<SqliteRegistry>,
    encoder: Vec<u8>,
    is_healthy: Arc<AtomicBool>,
    _directory: tempfile::TempDir,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&self.body)))
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// Checks the form of an error, and gives the last part of its type.
    fn problem(&self, status: u16) -> String {
        assert_eq!(self.status.as_u16(), status, "{}", String::from_utf8_lossy(&self.body));
        assert_eq!(self.header("content-type"), "application/problem+json");
        let document = self.json();
        assert_eq!(document["status"], status);
        assert!(document["title"].is_string() && document["detail"].is_string(), "{document}");
        document["type"].as_str().unwrap().rsplit(':').next().unwrap().to_owned()
    }
}

impl World {
    async fn new() -> Self {
        Self::with_token(Some(Token::new(TOKEN))).await
    }

    async fn with_token(token: Option<Token>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(directory.path().to_str().unwrap()).unwrap());
        let registry = Arc::new(SqliteRegistry::open("sqlite::memory:", "main").await.unwrap());
        registry.migrate().await.unwrap();
        let paths = Paths::new("main");
        let encoder = publish_first_version(&registry, &store, &paths).await;
        let is_healthy = Arc::new(AtomicBool::new(true));
        let (embedder, _thread) = Embedder::start(Device::Cpu).unwrap();
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let parts = Parts {
            registry: registry.clone(),
            store,
            paths,
            embedder,
            checks: checks(registry.clone(), is_healthy.clone()),
            metrics: recorder.handle(),
            token,
            limits: Limits { max_body_bytes: 64 << 10, max_embed_images: 3, max_pixels: 64 * 64 },
        };
        Self { router: router(parts), registry, encoder, is_healthy, _directory: directory }
    }

    async fn ask(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        let body = to_bytes(response.into_body(), usize::MAX).await.unwrap().to_vec();
        Answer { status, headers, body }
    }

    async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.ask(request(Method::GET, path, headers, Body::empty())).await
    }

    async fn embed(&self, query: &str, content_type: &str, body: impl Into<Body>) -> Answer {
        let path = format!("/v1/embed{query}");
        self.ask(request(Method::POST, &path, &[("content-type", content_type)], body.into())).await
    }

    async fn promote(&self, alias: &str, authorization: Option<&str>, body: &str) -> Answer {
        let headers: Vec<_> = authorization.map(|value| ("authorization", value)).into_iter().collect();
        let path = format!("/v1/aliases/{alias}");
        self.ask(request(Method::PUT, &path, &headers, Body::from(body.to_owned()))).await
    }
}

fn request(method: Method, path: &str, headers: &[(&str, &str)], body: Body) -> Request<Body> {
    let request = Request::builder().method(method).uri(path);
    headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)).body(body).unwrap()
}

fn checks(registry: Arc<SqliteRegistry>, is_healthy: Arc<AtomicBool>) -> Vec<Check> {
    let ping = move || {
        let registry = registry.clone();
        async move { registry.ping().await.map_err(|error| error.to_string()) }.boxed()
    };
    let ingest = move || {
        let is_healthy = is_healthy.load(Ordering::SeqCst);
        async move { if is_healthy { Ok(()) } else { Err("paused: the store is down".to_owned()) } }.boxed()
    };
    vec![Check::new("registry", ping), Check::new("ingest", ingest)]
}

/// The whole way of a period, by the registry's own methods. Returns the encoder file's bytes.
async fn publish_first_version(registry: &SqliteRegistry, store: &Store, paths: &Paths) -> Vec<u8> {
    let period = PeriodBounds { id: PeriodId(EventTime(0)), end: EventTime(1000) };
    commit_frames(registry, period).await;
    let lease = registry.acquire_lease("learner", "test", 60_000, NOW).await.unwrap().unwrap();
    let next = PeriodBounds { id: PeriodId(EventTime(1000)), end: EventTime(2000) };
    registry.seal(&lease, period.id, 1, next, NOW).await.unwrap();
    let attempt = registry.begin_attempt(&lease, period.id, "0.1.0", Lineage::Continued).await.unwrap();
    let (files, encoder) = put_files(store, &paths.version(Version(1))).await;
    registry.set_evaluating(&lease, period.id).await.unwrap();
    let reserved = registry.reserve_version(&lease, period.id, attempt.number, &files, NOW).await.unwrap();
    let version = reserved.version;
    assert_eq!(version, Version(1));
    let publication =
        Publication { version, manifest: MANIFEST.into(), files, scores: vec![], probe_set: None };
    registry.publish(&lease, &publication, NOW).await.unwrap();
    encoder
}

async fn commit_frames(registry: &SqliteRegistry, period: PeriodBounds) {
    let topic_id = registry.open_topic("frames", "cluster").await.unwrap();
    let partition = TopicPartition { topic: "frames".into(), topic_id, partition: 0 };
    registry.register_partitions(std::slice::from_ref(&partition)).await.unwrap();
    registry.start_position(&partition, 0).await.unwrap();
    let offsets = OffsetRange { start: 0, end: 7 };
    let segment = SegmentRecord {
        period: period.id,
        partition: partition.clone(),
        flush: offsets,
        file: FileRef { path: "main/segments/x".into(), sha256: Sha256::of(b"x"), bytes: 1 },
        frames: 7,
        captured_min: EventTime(0),
        captured_max: EventTime(6),
    };
    let flush = Flush {
        partition,
        offsets,
        watermark: Some(EventTime(6)),
        segments: vec![segment],
        periods: vec![period],
        lost: None,
    };
    registry.commit_flush(&flush).await.unwrap();
}

async fn put_files(store: &Store, prefix: &str) -> (Vec<FileRef>, Vec<u8>) {
    let spec = EncoderSpec { architecture: Architecture::ResnetSmall, image_size: 32, patch_size: 8 };
    let preprocessing =
        Preprocessing { mean: [0.5; 3], std: [0.25; 3], interpolation: "bilinear", crop_ratio: 1.0 };
    let weights = Weights::initialise(&spec.parameters(), 7, &Device::Cpu).unwrap();
    let encoder = weights.to_safetensors().unwrap();
    let config = encoder_config(&spec, &preprocessing).into_bytes();
    let mut files = Vec::new();
    for (name, bytes) in [
        ("encoder.safetensors", encoder.clone()),
        ("config.json", config),
        ("embeddings/00000.parquet", b"PAR1".to_vec()),
        ("README.md", b"# v000001\n".to_vec()),
    ] {
        files.push(FileRef { path: name.into(), sha256: Sha256::of(&bytes), bytes: bytes.len() as u64 });
        store.put(&format!("{prefix}/{name}"), bytes.into()).await.unwrap();
    }
    (files, encoder)
}

fn png(width: u32, height: u32, seed: u8) -> Vec<u8> {
    let colour = |x: u32, y: u32| image::Rgb([(x * 7) as u8, (y * 11) as u8, seed]);
    let mut bytes = Cursor::new(Vec::new());
    image::RgbImage::from_fn(width, height, colour).write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

#[tokio::test]
async fn versions_are_listed_with_their_aliases() {
    let world = World::new().await;
    let answer = world.get("/v1/versions", &[]).await.json();
    assert_eq!(answer["aliases"], json!({ "latest": "v000001" }));
    let version = &answer["versions"][0];
    assert_eq!((&version["version"], &version["period"]), (&json!("v000001"), &json!("19700101T000000Z")));
    assert_eq!(version["published_at"], "1970-01-01T01:23:20.000Z");
    assert_eq!(
        (&version["aliases"], &version["manifest"]),
        (&json!(["latest"]), &json!("/v1/versions/v000001"))
    );
}

#[tokio::test]
async fn a_manifest_is_given_as_it_was_published_by_number_and_by_alias() {
    let world = World::new().await;
    for name in ["v000001", "1", "latest"] {
        let answer = world.get(&format!("/v1/versions/{name}"), &[]).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(answer.body, MANIFEST.as_bytes());
        assert_eq!(answer.header("cache-control"), "no-cache");
        let location = if name == "latest" { "/v1/versions/v000001" } else { "" };
        assert_eq!(answer.header("content-location"), location);
        let again =
            world.get(&format!("/v1/versions/{name}"), &[("if-none-match", answer.header("etag"))]).await;
        assert_eq!((again.status, again.body.len()), (StatusCode::NOT_MODIFIED, 0));
    }
}

#[tokio::test]
async fn what_is_not_published_is_not_there() {
    let world = World::new().await;
    for name in ["v000002", "stable", "v1x"] {
        assert_eq!(world.get(&format!("/v1/versions/{name}"), &[]).await.problem(404), "unknown-version");
    }
    let path = "/v1/versions/v000001/files/..%2F..%2Fsegments%2Fx";
    assert_eq!(world.get(path, &[]).await.problem(404), "unknown-file");
    assert_eq!(world.get("/v1/versions/v000001/files/none", &[]).await.problem(404), "unknown-file");
}

#[tokio::test]
async fn a_file_has_its_hash_as_tag_and_may_be_kept_for_ever() {
    let world = World::new().await;
    let path = "/v1/versions/v000001/files/encoder.safetensors";
    let answer = world.get(path, &[]).await;
    assert_eq!((answer.status, &answer.body), (StatusCode::OK, &world.encoder));
    let tag = format!("\"{}\"", Sha256::of(&world.encoder));
    assert_eq!(answer.header("etag"), tag);
    assert_eq!(answer.header("cache-control"), "public, max-age=31536000, immutable");
    assert_eq!(answer.header("content-length"), world.encoder.len().to_string());
    for named in [tag.clone(), format!("W/{tag}"), format!("\"other\", {tag}"), "*".into()] {
        let again = world.get(path, &[("if-none-match", &named)]).await;
        assert_eq!((again.status, again.header("etag")), (StatusCode::NOT_MODIFIED, tag.as_str()), "{named}");
        assert!(again.body.is_empty());
    }
    assert_eq!(world.get(path, &[("if-none-match", "\"other\"")]).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_file_named_by_an_alias_is_asked_for_again_each_time() {
    let world = World::new().await;
    let answer = world.get("/v1/versions/latest/files/embeddings/00000.parquet", &[]).await;
    assert_eq!((answer.body.as_slice(), answer.header("cache-control")), (b"PAR1".as_slice(), "no-cache"));
    assert_eq!(answer.header("content-location"), "/v1/versions/v000001/files/embeddings/00000.parquet");
    assert_eq!(answer.header("content-type"), "application/vnd.apache.parquet");
}

#[tokio::test]
async fn a_part_of_a_file_can_be_asked_for() {
    let world = World::new().await;
    let path = "/v1/versions/v000001/files/encoder.safetensors";
    let length = world.encoder.len();
    let part = world.get(path, &[("range", "bytes=10-19")]).await;
    assert_eq!((part.status, part.body.as_slice()), (StatusCode::PARTIAL_CONTENT, &world.encoder[10..20]));
    assert_eq!(part.header("content-range"), format!("bytes 10-19/{length}"));
    let tail = world.get(path, &[("range", "bytes=-5")]).await;
    assert_eq!(tail.body, world.encoder[length - 5..]);
    let behind = world.get(path, &[("range", &format!("bytes={length}-"))]).await;
    assert_eq!(behind.problem(416), "range-not-satisfiable");
    assert_eq!(behind.header("content-range"), format!("bytes */{length}"));
    let stale = world.get(path, &[("range", "bytes=0-1"), ("if-range", "\"old\"")]).await;
    assert_eq!((stale.status, stale.body.len()), (StatusCode::OK, length));
}

#[tokio::test]
async fn head_tells_the_length_without_the_bytes() {
    let world = World::new().await;
    let path = "/v1/versions/v000001/files/encoder.safetensors";
    let answer = world.ask(request(Method::HEAD, path, &[], Body::empty())).await;
    assert_eq!((answer.status, answer.body.len()), (StatusCode::OK, 0));
    assert_eq!(answer.header("content-length"), world.encoder.len().to_string());
}

#[tokio::test]
async fn periods_are_listed() {
    let world = World::new().await;
    let answer = world.get("/v1/periods", &[]).await.json();
    let period = &answer["periods"][0];
    assert_eq!((&period["state"], &period["frames"]), (&json!("published"), &json!(7)));
    assert_eq!((&period["version"], &period["end"]), (&json!("v000001"), &json!("1970-01-01T00:00:01.000Z")));
}

#[tokio::test]
async fn an_alias_moves_for_who_has_the_token() {
    let world = World::new().await;
    let bearer = format!("Bearer {TOKEN}");
    let body = r#"{"version": "v000001"}"#;
    let answer = world.promote("stable", Some(&bearer), body).await;
    assert_eq!(answer.json(), json!({ "alias": "stable", "version": "v000001" }));
    assert_eq!(world.registry.aliases().await.unwrap()["stable"], Version(1));
    let refused = world.promote("other", None, body).await;
    assert_eq!(
        (refused.problem(401).as_str(), refused.header("www-authenticate")),
        ("unauthorised", "Bearer")
    );
    assert_eq!(world.promote("other", Some("Bearer wrong"), body).await.problem(401), "unauthorised");
    assert_eq!(world.promote("v7", Some(&bearer), body).await.problem(400), "bad-alias");
    assert_eq!(world.promote("other", Some(&bearer), "{}").await.problem(400), "bad-body");
    let unknown = world.promote("other", Some(&bearer), r#"{"version": "v000009"}"#).await;
    assert_eq!(unknown.problem(404), "not-found");
    assert!(!world.registry.aliases().await.unwrap().contains_key("other"));
}

#[tokio::test]
async fn without_a_configured_token_no_alias_moves() {
    let world = World::with_token(None).await;
    let answer = world.promote("stable", Some("Bearer "), r#"{"version": "v000001"}"#).await;
    assert_eq!(answer.problem(403), "no-token-configured");
}

#[tokio::test]
async fn an_image_is_embedded_the_same_alone_and_among_others() {
    let world = World::new().await;
    let alone = world.embed("", "image/png", png(40, 32, 1)).await;
    assert_eq!(alone.status, StatusCode::OK, "{}", String::from_utf8_lossy(&alone.body));
    let alone = alone.json();
    assert_eq!((&alone["version"], &alone["dimension"]), (&json!("v000001"), &json!(DIMENSION)));
    let images = [png(32, 32, 9), png(40, 32, 1)].map(|bytes| STANDARD.encode(bytes));
    let body = json!({ "images": images }).to_string();
    let many = world.embed("?version=1", "application/json; charset=utf-8", body).await.json();
    let rows = many["embeddings"].as_array().unwrap();
    assert_eq!((rows.len(), rows[0].as_array().unwrap().len()), (2, DIMENSION));
    for (a, b) in rows[1].as_array().unwrap().iter().zip(alone["embeddings"][0].as_array().unwrap()) {
        let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
        assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{a} and {b}");
    }
    assert_ne!(rows[0], rows[1]);
}

#[tokio::test]
async fn a_version_at_hand_embeds_without_asking_the_registry_again_but_an_alias_is_asked_each_time() {
    let world = World::new().await;
    let first = world.embed("?version=1", "image/png", png(8, 8, 1)).await;
    assert_eq!(first.status, StatusCode::OK, "{}", String::from_utf8_lossy(&first.body));
    world.registry.close().await;
    assert_eq!(world.embed("?version=1", "image/png", png(8, 8, 1)).await.body, first.body);
    assert!(world.embed("", "image/png", png(8, 8, 1)).await.status.is_server_error());
    assert!(world.embed("?version=2", "image/png", png(8, 8, 1)).await.status.is_server_error());
}

#[tokio::test]
async fn what_can_not_be_embedded_is_told_why() {
    let world = World::new().await;
    let bad = world.embed("", "image/png", &b"no image"[..]).await;
    assert_eq!((bad.problem(422).as_str(), &bad.json()["image"]), ("bad-image", &json!(0)));
    let large = world.embed("", "image/png", png(65, 64, 0)).await;
    assert_eq!(large.problem(422), "image-too-large");
    let cut = &png(40, 40, 0)[..100];
    let images = [STANDARD.encode(png(8, 8, 0)), STANDARD.encode(cut)];
    let second = world.embed("", "application/json", json!({ "images": images }).to_string()).await;
    assert_eq!((second.problem(422).as_str(), &second.json()["image"]), ("bad-image", &json!(1)));
    assert_eq!(world.embed("", "text/plain", "x").await.problem(415), "unsupported-media-type");
    assert_eq!(world.embed("", "image/png", Body::empty()).await.problem(400), "bad-body");
    for body in [r#"{"images": []}"#, r#"{"images": ["!"]}"#, r#"{"pictures": []}"#, "{"] {
        assert_eq!(world.embed("", "application/json", body).await.problem(400), "bad-body", "{body}");
    }
    let four = json!({ "images": ["", "", "", ""] }).to_string();
    assert_eq!(world.embed("", "application/json", four).await.problem(413), "too-large");
    assert_eq!(world.embed("?version=none", "image/png", png(8, 8, 0)).await.problem(404), "unknown-version");
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused_whether_it_says_so_or_not() {
    let world = World::new().await;
    let headers = [("content-type", "image/png"), ("content-length", "999999999")];
    let answer = world.ask(request(Method::POST, "/v1/embed", &headers, Body::empty())).await;
    assert_eq!(answer.problem(413), "too-large");
    let silent = Body::from_stream(futures::stream::iter(
        (0..100).map(|_| Ok::<_, std::io::Error>(bytes::Bytes::from_static(&[0; 1024]))),
    ));
    assert_eq!(world.embed("", "image/png", silent).await.problem(413), "too-large");
}

#[tokio::test]
async fn the_routers_own_errors_are_problem_documents_too() {
    let world = World::new().await;
    assert_eq!(world.get("/v2/none", &[]).await.problem(404), "blank");
    let wrong = world.ask(request(Method::DELETE, "/v1/versions", &[], Body::empty())).await;
    assert_eq!(wrong.problem(405), "blank");
    assert_eq!(wrong.header("allow"), "GET,HEAD");
    assert_eq!(world.get("/v1/versions/%ff", &[]).await.problem(400), "blank");
    assert_eq!(world.embed("?version=a&version=b", "image/png", "x").await.problem(400), "bad-query");
}

#[tokio::test]
async fn readiness_names_the_check_that_fails_and_health_does_not_care() {
    let world = World::new().await;
    let ready = world.get("/readyz", &[]).await.json();
    assert_eq!(ready, json!({ "status": "ready", "checks": { "registry": "ok", "ingest": "ok" } }));
    world.is_healthy.store(false, Ordering::SeqCst);
    let answer = world.get("/readyz", &[]).await;
    assert_eq!(answer.problem(503), "not-ready");
    assert_eq!(answer.json()["checks"]["ingest"], "paused: the store is down");
    assert_eq!(world.get("/healthz", &[]).await.status, StatusCode::OK);
}

#[tokio::test]
async fn requests_are_measured_under_their_route() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    let world = World::new().await;
    let guard = metrics::set_default_local_recorder(&recorder);
    for path in ["versions", "versions/1", "versions/1/files/README.md", "periods", "aliases/a", "embed"] {
        world.get(&format!("/v1/{path}"), &[]).await;
    }
    for path in ["/healthz", "/readyz", "/metrics", "/secret/path"] {
        world.get(path, &[]).await;
    }
    drop(guard);
    let text = handle.render();
    let routes: BTreeSet<&str> =
        text.split("route=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert_eq!(routes, ROUTES.iter().copied().collect(), "{text}");
    let has = |labels: &str| text.contains(&format!("{HTTP_REQUESTS}_count{{{labels}}} 1"));
    assert!(has("route=\"/v1/versions/{version}\",method=\"GET\",status=\"200\""), "{text}");
    assert!(has("route=\"none\",method=\"GET\",status=\"404\""), "{text}");
}

/// `metrics` may not name the types whose values its labels are.
#[test]
fn every_state_operation_and_reason_has_its_series_from_the_start() {
    let text = palimpsest::metrics::install("main").unwrap().render();
    let states = PeriodState::ALL
        .map(|state| format!("palimpsest_periods{{pipeline=\"main\",state=\"{}\"}} NaN", state.as_str()));
    let operations = Op::ALL.map(|op| format!("op=\"{op}\",outcome=\"error\"}} 0"));
    let reasons = Reason::NAMES.map(|reason| format!("verdict=\"rejected\",reason=\"{reason}\"}} 0"));
    assert_eq!(GATE_REASONS, Reason::NAMES);
    for line in states.iter().chain(&operations).chain(&reasons) {
        assert!(text.contains(line), "{line} is not in {text}");
    }
}

/// Over a real connection: an open request is finished, then the server ends.
#[tokio::test]
async fn a_cancelled_server_ends() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Arc::new(SqliteRegistry::open("sqlite::memory:", "main").await.unwrap());
    registry.migrate().await.unwrap();
    let (embedder, thread) = Embedder::start(Device::Cpu).unwrap();
    let parts = Parts {
        registry,
        store: Arc::new(Store::open(directory.path().to_str().unwrap()).unwrap()),
        paths: Paths::new("main"),
        embedder,
        checks: vec![],
        metrics: metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder().handle(),
        token: None,
        limits: Limits { max_body_bytes: 1024, max_embed_images: 1, max_pixels: 64 },
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let token = tokio_util::sync::CancellationToken::new();
    let server = tokio::spawn(palimpsest::serve::run(listener, parts, token.clone()));
    let answer = reqwest::get(format!("http://{address}/healthz")).await.unwrap();
    assert_eq!(answer.status(), 200);
    token.cancel();
    server.await.unwrap().unwrap();
    tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap();
}
