//! The hub over a web server on this machine: ranges, redirects, refusals, breaks, repositories.

use super::catalogue::{HubFile, Source};
use super::error::HubError;
use super::progress::Silent;
use super::tests::{World, content, file, model};
use super::web::Web;
use super::{Resolved, store};
use proptest::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// A file as the server has it.
#[derive(Clone, Default)]
struct Served {
    body: Vec<u8>,
    /// Body bytes sent on each connection before it breaks; whole when the list is used up.
    breaks: Vec<usize>,
    /// Header lines added to every answer.
    headers: Vec<String>,
    /// Answered in place of the body.
    status: Option<&'static str>,
    ignores_ranges: bool,
}

#[derive(Clone, Default)]
struct Site {
    files: Arc<Mutex<BTreeMap<String, Served>>>,
    /// Request heads in lower case, as they came.
    requests: Arc<Mutex<Vec<String>>>,
}

impl Site {
    /// Serves until the process ends; returns the endpoint.
    fn start(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let site = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let site = site.clone();
                std::thread::spawn(move || site.answer(stream));
            }
        });
        endpoint
    }

    fn put(&self, path: &str, served: Served) {
        self.files.lock().unwrap().insert(path.to_owned(), served);
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    fn answer(&self, mut stream: TcpStream) -> Option<()> {
        let mut head = String::new();
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        let path = head.split(' ').nth(1)?.to_owned();
        let head = head.to_lowercase();
        let range = head.split("range: bytes=").nth(1);
        let start: usize = range.map_or(0, |r| r.split('-').next().unwrap().parse().unwrap());
        self.requests.lock().unwrap().push(head);

        let found = {
            let mut files = self.files.lock().unwrap();
            let served = files.get_mut(&path);
            served.map(|served| {
                let limit = (!served.breaks.is_empty()).then(|| served.breaks.remove(0));
                (served.clone(), limit)
            })
        };
        let Some((served, limit)) = found else {
            write!(
                stream,
                "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            )
            .ok()?;
            return None;
        };
        let start = if served.ignores_ranges { 0 } else { start };
        let total = served.body.len();
        let mut lines = served.headers.clone();
        let status = match served.status {
            Some(status) => status,
            None if start > 0 && start >= total => "416 Range Not Satisfiable",
            None if start > 0 => {
                lines.push(format!(
                    "content-range: bytes {start}-{}/{total}",
                    total - 1
                ));
                "206 Partial Content"
            }
            None => "200 OK",
        };
        let body = match served.status {
            None if start < total => &served.body[start..],
            _ => &[],
        };
        lines.push(format!("content-length: {}", body.len()));
        lines.push("connection: close".to_owned());
        write!(
            stream,
            "HTTP/1.1 {status}\r\n{}\r\n\r\n",
            lines.join("\r\n")
        )
        .ok()?;
        stream
            .write_all(&body[..limit.unwrap_or(body.len()).min(body.len())])
            .ok()
    }
}

const PATH: &str = "/org/repo/resolve/main/m.gguf";

fn hub_source() -> Vec<Source> {
    vec![Source::Hub(HubFile {
        repo: "org/repo".to_owned(),
        file: "m.gguf".to_owned(),
        revision: "main".to_owned(),
    })]
}

/// A world whose model `tiny` comes from `site`.
fn world(site: &Site, bytes: &[u8]) -> World {
    let mut world = World::new(vec![(
        "tiny",
        model(vec![file("m.gguf", bytes, hub_source())]),
    )]);
    let token = Some("secret".to_owned());
    world.hub.web = Web::with_proxy(&site.start(), token, None);
    world
}

fn sha(bytes: &[u8]) -> String {
    store::hex(&Sha256::digest(bytes))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// However often the connection breaks, the file comes out whole, and nothing is fetched twice.
    #[test]
    fn breaks_are_continued_by_ranges(breaks in prop::collection::vec(1usize..60_000, 0..8)) {
        let bytes = content(150_000);
        let site = Site::default();
        let served = Served { body: bytes.clone(), breaks: breaks.clone(), ..Served::default() };
        site.put(PATH, served);
        let world = world(&site, &bytes);
        let path = world.hub.pull("tiny", &Silent).unwrap();
        prop_assert_eq!(fs::read(path).unwrap(), bytes);
        let mut at = 0;
        let mut starts = vec![0];
        for length in breaks {
            at += length;
            if at >= 150_000 {
                break;
            }
            starts.push(at);
        }
        let asked: Vec<usize> = site.requests().iter().map(|head| {
            head.split("range: bytes=").nth(1).map_or(0, |r| r.split('-').next().unwrap().parse().unwrap())
        }).collect();
        prop_assert_eq!(asked, starts);
    }
}

#[test]
fn a_second_pull_continues_the_first() {
    let bytes = content(100_000);
    let site = Site::default();
    let served = |breaks: Vec<usize>, etag: &str| Served {
        body: bytes.clone(),
        breaks,
        headers: vec![format!("etag: \"{etag}\"")],
        ..Served::default()
    };
    // 40,000 bytes come, then every connection breaks at once.
    site.put(PATH, served(vec![40_000, 0], "one"));
    let world = world(&site, &bytes);
    let text = world.hub.pull("tiny", &Silent).unwrap_err().to_string();
    assert!(text.contains("broke after 40000 bytes"), "{text}");
    site.put(PATH, served(vec![], "one"));
    world.hub.pull("tiny", &Silent).unwrap();
    let last = site.requests().pop().unwrap();
    assert!(last.contains("range: bytes=40000-"), "{last}");

    // Another tag means another content: start over.
    let path = world.hub.alias_folder("tiny").join("m.gguf");
    fs::remove_file(&path).unwrap();
    site.put(PATH, served(vec![40_000, 0], "one"));
    world.hub.pull("tiny", &Silent).unwrap_err();
    site.put(PATH, served(vec![], "two"));
    world.hub.pull("tiny", &Silent).unwrap();
    assert_eq!(fs::read(&path).unwrap(), bytes);
}

#[test]
fn a_server_without_ranges_starts_over() {
    let bytes = content(90_000);
    let site = Site::default();
    site.put(
        PATH,
        Served {
            body: bytes.clone(),
            breaks: vec![50_000],
            ignores_ranges: true,
            ..Served::default()
        },
    );
    let world = world(&site, &bytes);
    let path = world.hub.pull("tiny", &Silent).unwrap();
    assert_eq!(fs::read(path).unwrap(), bytes);
}

#[test]
fn another_file_is_refused_before_it_is_sent() {
    let bytes = content(50_000);
    let site = Site::default();
    let other = sha(b"other");
    let big = Served {
        body: bytes.clone(),
        headers: vec![format!("x-linked-etag: \"{other}\"")],
        ..Served::default()
    };
    site.put(PATH, big);
    let world = world(&site, &bytes);
    let text = world.hub.pull("tiny", &Silent).unwrap_err().to_string();
    assert!(
        text.contains(&other) && text.contains(&sha(&bytes)),
        "{text}"
    );

    // Without a hash from the hub, the size alone refuses; with the right size, the hash at the end.
    site.put(
        PATH,
        Served {
            body: content(50_001),
            ..Served::default()
        },
    );
    let text = world.hub.pull("tiny", &Silent).unwrap_err().to_string();
    assert!(text.contains("50001 bytes found, 50000 expected"), "{text}");
    let mut flipped = bytes.clone();
    flipped[7] ^= 1;
    site.put(
        PATH,
        Served {
            body: flipped.clone(),
            ..Served::default()
        },
    );
    let text = world.hub.pull("tiny", &Silent).unwrap_err().to_string();
    assert!(text.contains(&sha(&flipped)), "{text}");
    assert!(!world.hub.alias_folder("tiny").join("m.gguf").exists());

    site.put(
        PATH,
        Served {
            body: bytes.clone(),
            ..Served::default()
        },
    );
    world.hub.pull("tiny", &Silent).unwrap();
}

#[test]
fn redirects_are_followed_and_the_token_stays_with_the_hub() {
    let bytes = content(20_000);
    let store_site = Site::default();
    store_site.put(
        "/blob?sig=1",
        Served {
            body: bytes.clone(),
            ..Served::default()
        },
    );
    let elsewhere = store_site.start();
    let site = Site::default();
    let to = |location: String| Served {
        status: Some("302 Found"),
        headers: vec![
            format!("location: {location}"),
            format!("x-linked-etag: \"{}\"", sha(&content(20_000))),
        ],
        ..Served::default()
    };
    site.put(PATH, to("/moved/m.gguf".to_owned()));
    site.put("/moved/m.gguf", to(format!("{elsewhere}/blob?sig=1")));
    let world = world(&site, &bytes);
    world.hub.pull("tiny", &Silent).unwrap();
    assert_eq!(site.requests().len(), 2);
    assert!(
        site.requests()
            .iter()
            .all(|head| head.contains("authorization: bearer secret"))
    );
    assert!(
        store_site
            .requests()
            .iter()
            .all(|head| !head.contains("authorization"))
    );

    fs::remove_file(world.hub.alias_folder("tiny").join("m.gguf")).unwrap();
    site.put("/moved/m.gguf", to(PATH.to_owned()));
    let text = world.hub.pull("tiny", &Silent).unwrap_err().to_string();
    assert!(text.contains("redirects"), "{text}");
}

#[test]
fn refusals_say_what_to_do() {
    let bytes = content(100);
    let site = Site::default();
    let world = world(&site, &bytes);
    let pull = || world.hub.pull("tiny", &Silent).unwrap_err().to_string();
    let text = pull();
    assert!(
        text.contains("404") && text.contains("no such repository or file"),
        "{text}"
    );
    site.put(
        PATH,
        Served {
            status: Some("403 Forbidden"),
            ..Served::default()
        },
    );
    let text = pull();
    assert!(text.contains("403") && text.contains("HF_TOKEN"), "{text}");
    site.put(
        PATH,
        Served {
            status: Some("500 Oops"),
            ..Served::default()
        },
    );
    assert!(pull().contains("500"));
}

#[test]
fn a_dead_hub_is_named() {
    let bytes = content(100);
    let mut world = world(&Site::default(), &bytes);
    // A port that was just free: connections are refused.
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let endpoint = format!("http://{port}");
    world.hub.web = Web::with_proxy(&endpoint, None, None);
    let text = world.hub.pull("tiny", &Silent).unwrap_err().to_string();
    assert!(
        text.contains(&endpoint) && text.contains("HF_ENDPOINT"),
        "{text}"
    );
}

#[test]
fn a_repository_becomes_a_folder() {
    let site = Site::default();
    let world = world(&site, b"");
    let put = |name: &str, body: &[u8]| {
        let served = Served {
            body: body.to_vec(),
            ..Served::default()
        };
        site.put(&format!("/org/repo/resolve/main/{name}"), served);
    };
    let obtain = |spec: &str| world.hub.obtain(spec, &Silent);

    // Neither config.json nor GGUF; then GGUF only, which must be named.
    let index = |names: &str| Served {
        body: format!("{{\"siblings\": [{names}]}}").into_bytes(),
        ..Served::default()
    };
    site.put(
        "/api/models/org/repo",
        index("{\"rfilename\": \"README.md\"}"),
    );
    let text = obtain("org/repo").unwrap_err().to_string();
    assert!(text.contains("no config.json and no .gguf"), "{text}");
    site.put(
        "/api/models/org/repo",
        index("{\"rfilename\": \"a.gguf\"}, {\"rfilename\": \"b.gguf\"}"),
    );
    let text = obtain("org/repo").unwrap_err().to_string();
    assert!(
        text.contains("org/repo:FILE") && text.contains("a.gguf, b.gguf"),
        "{text}"
    );
    put("a.gguf", &content(1000));
    let path = obtain("org/repo:a.gguf").unwrap();
    assert_eq!(fs::read(&path).unwrap(), content(1000));
    assert_eq!(
        world.hub.resolve("org/repo:a.gguf").unwrap(),
        Resolved::Gguf(path)
    );

    // One weights file, then shards by an index; a folder left incomplete is continued.
    put("config.json", b"{}");
    put("tokenizer.json", b"{\"t\": 1}");
    let text = obtain("org/repo").unwrap_err().to_string();
    assert!(
        text.contains("model.safetensors") && text.contains("404"),
        "{text}"
    );
    put(
        "model.safetensors.index.json",
        br#"{"weight_map": {"x": "one.safetensors", "y": "two.safetensors", "z": "one.safetensors"}}"#,
    );
    put("one.safetensors", &content(3000));
    obtain("org/repo").unwrap_err();
    put("two.safetensors", &content(2000));
    let folder = obtain("org/repo").unwrap();
    let size = |name: &str| fs::metadata(Path::new(&folder).join(name)).unwrap().len();
    assert_eq!(
        (size("one.safetensors"), size("two.safetensors")),
        (3000, 2000)
    );
    assert_eq!(
        fs::read(folder.join("tokenizer.json")).unwrap(),
        b"{\"t\": 1}"
    );
    let asked = site
        .requests()
        .iter()
        .filter(|r| r.contains("/one.safetensors"))
        .count();
    assert_eq!(asked, 1, "the first shard was kept");

    // Whole now: no request is made any more.
    let before = site.requests().len();
    assert_eq!(obtain("org/repo").unwrap(), folder);
    assert_eq!(
        world.hub.resolve("org/repo").unwrap(),
        Resolved::Directory(folder)
    );
    assert_eq!(site.requests().len(), before);

    // An index that points outside is refused.
    put(
        "model.safetensors.index.json",
        br#"{"weight_map": {"x": "../../evil"}}"#,
    );
    fs::remove_file(world.hub.repository_folder("org/repo").join(".complete")).unwrap();
    let error = obtain("org/repo").unwrap_err();
    assert!(matches!(error, HubError::Repository { .. }), "{error}");
    assert!(error.to_string().contains("../../evil"));
}
