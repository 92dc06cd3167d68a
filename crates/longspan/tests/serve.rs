//! The program as a server and as a talk that is remembered: the same answers as on the command line, other names of a
//! model, and what is left after `kill -9`.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

fn golden() -> PathBuf {
    let golden = std::env::var_os("LONGSPAN_GOLDEN").map(PathBuf::from);
    golden.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"))
}

fn model() -> PathBuf {
    golden().join("tiny-models/gguf-llama/model.gguf")
}

/// The program on the tiny model, with caches in `home` and a window that prompts of real words fit into.
fn longspan(home: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_longspan"));
    command.args(words);
    if !["memory", "search"].contains(&words[0]) {
        command
            .args(["--rope", "linear:64", "--model"])
            .arg(model());
    }
    command
        .env("LONGSPAN_CONFIG", "/nonexistent/longspan.toml")
        .env("LONGSPAN_CACHE", home.join("cache"))
        .env_remove("LONGSPAN_API_KEY")
        .env_remove("LONGSPAN_CPU")
        .stdin(Stdio::null());
    command
}

fn json_of(home: &Path, words: &[&str]) -> Value {
    let output = longspan(home, words).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {error}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A server that is killed when dropped.
struct Server {
    child: Child,
    address: String,
    model: String,
}

impl Server {
    fn start(home: &Path, more: &[&str]) -> Server {
        let any = match more.contains(&"--listen") {
            true => &[][..],
            false => &["--listen", "127.0.0.1:0"],
        };
        let words = [&["serve", "--json"], any, more].concat();
        let mut child = longspan(home, &words)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let said: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line:?}"));
        let address = said["url"].as_str().unwrap();
        Server {
            child,
            address: address["http://".len()..].trim_end_matches('/').into(),
            model: said["model"].as_str().unwrap().into(),
        }
    }

    fn send(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let timeout = Some(Duration::from_secs(120));
        stream.set_read_timeout(timeout).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let mut answer = String::new();
        self.send(method, path, &body)
            .read_to_string(&mut answer)
            .unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    fn post(&self, path: &str, body: Value) -> Value {
        let (status, reply) = self.call("POST", path, &body);
        assert_eq!(status, 200, "{path}: {reply}");
        reply
    }

    fn kill(mut self) {
        // SIGKILL on Unix: nothing is tidied up.
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const CHAT: &str = "/v1/chat/completions";

fn asks(text: &str, more: Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": 16, "temperature": 0 });
    let own = body.as_object_mut().unwrap();
    own.extend(more.as_object().unwrap().clone());
    body
}

#[test]
fn greedy_answers_are_those_of_the_command_line() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start(home.path(), &[]);
    for prompt in ["abc abc", "Who keeps the keys of the tower?", "a.b c"] {
        let words = ["generate", prompt, "--max-tokens", "16", "--json"];
        let own = json_of(home.path(), &words);
        let body = json!({ "prompt": prompt, "max_tokens": 16, "temperature": 0 });
        let reply = server.post("/v1/completions", body);
        assert_eq!(reply["choices"][0]["text"], own["answer"], "{prompt}");
        assert_eq!(
            reply["choices"][0]["finish_reason"], own["finish_reason"],
            "{prompt}"
        );
        assert_eq!(reply["usage"]["completion_tokens"], own["answer_tokens"]);
    }
    // A talk: each line sees those before it.
    let mut talk = longspan(
        home.path(),
        &["chat", "--context", "full", "--max-tokens", "16", "--json"],
    )
    .stdin(Stdio::piped())
    .stdout(Stdio::piped())
    .spawn()
    .unwrap();
    // Longer than the steps at which an earlier prompt can be gone on with.
    let first = "Hello there. ".repeat(40);
    let lines = [first.trim(), "And then?"];
    let mut stdin = talk.stdin.take().unwrap();
    stdin.write_all(lines.join("\n").as_bytes()).unwrap();
    drop(stdin);
    let output = talk.wait_with_output().unwrap();
    assert!(output.status.success());
    let said: Vec<Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(said.len(), 2);
    let mut messages = Vec::new();
    for (line, own) in lines.iter().zip(&said) {
        messages.push(json!({ "role": "user", "content": line }));
        let body =
            json!({ "messages": messages, "max_tokens": 16, "temperature": 0, "context": "full" });
        let reply = server.post(CHAT, body);
        let message = &reply["choices"][0]["message"];
        assert_eq!(message["content"], own["answer"]);
        assert_eq!(reply["usage"]["prompt_tokens"], own["prompt_tokens"]);
        messages.push(message.clone());
    }
    // The second line's prompt begins with what was read for the first.
    assert!(said[1]["read_tokens"].as_u64() < said[1]["prompt_tokens"].as_u64());
    // A document.
    let text = "The keeper has seven keys. ".repeat(6);
    let file = home.path().join("keys.txt");
    std::fs::write(&file, &text).unwrap();
    let file = file.display().to_string();
    let own = json_of(
        home.path(),
        &["ask", &file, "How many?", "--max-tokens", "16", "--json"],
    );
    let upload = server.post("/v1/documents", json!({ "name": "keys", "text": text }));
    let reply = server.post(CHAT, asks("How many?", json!({ "session": upload["id"] })));
    assert_eq!(upload["tokens"], own["document_tokens"]);
    assert_eq!(reply["choices"][0]["message"]["content"], own["answer"]);
}

#[test]
fn a_model_has_a_friendly_name_and_others_that_mean_it() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start(home.path(), &[]);
    assert_eq!(server.model, "model");
    let path = model().display().to_string();
    let (status, list) = server.call("GET", "/v1/models", &Value::Null);
    assert_eq!((status, &list["data"][0]["id"]), (200, &json!("model")));
    let aliases = list["data"][0]["aliases"].as_array().unwrap();
    assert!(aliases.contains(&json!(path)), "{aliases:?}");
    for name in ["", "model", "model.gguf", &path] {
        let reply = server.post(CHAT, asks("x", json!({ "model": name })));
        assert_eq!(reply["model"], "model");
    }
    let (status, reply) = server.call("POST", CHAT, &asks("x", json!({ "model": "other" })));
    let error = &reply["error"];
    assert_eq!(
        (status, error["code"].as_str()),
        (404, Some("model_not_found"))
    );
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("\"other\"") && message.contains("\"model\""),
        "{message}"
    );
    assert_eq!(
        server.call("GET", "/v1/models/model.gguf", &Value::Null).0,
        200
    );
    assert_eq!(server.call("GET", "/v1/models/other", &Value::Null).0, 404);
}

#[test]
fn a_killed_server_leaves_its_documents_to_the_next() {
    let home = tempfile::tempdir().unwrap();
    let kept = home.path().join("kept").display().to_string();
    let options = ["--documents", kept.as_str()];
    let server = Server::start(home.path(), &options);
    let text = "Day 7: the brass key lies under the third stone. ".repeat(5);
    let upload = server.post("/v1/documents", json!({ "name": "diary", "text": text }));
    let id = upload["id"].clone();
    let ask = |server: &Server| {
        let reply = server.post(CHAT, asks("Where is the key?", json!({ "session": id })));
        reply["choices"].clone()
    };
    let first = ask(&server);
    // Killed in the middle of an answer, and of reading another document.
    let long = asks(
        "Go on",
        json!({ "stream": true, "max_tokens": 4000, "session": id, "stop": "never written" }),
    );
    let mut stream = server.send("POST", CHAT, &long.to_string());
    let mut begun = [0; 64];
    assert!(stream.read(&mut begun).unwrap() > 0);
    let other = json!({ "name": "other", "text": "x y ".repeat(400) });
    let _other = server.send("POST", "/v1/documents", &other.to_string());
    server.kill();
    let server = Server::start(home.path(), &options);
    assert_eq!(ask(&server), first);
    let (_, list) = server.call("GET", "/v1/documents", &Value::Null);
    let names: Vec<&Value> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| &d["id"])
        .collect();
    assert!(names.contains(&&id), "{names:?}");
    assert_eq!(server.call("GET", "/healthz", &Value::Null).0, 200);
}

/// A talk with a memory; `line` asks and waits for the answer.
struct Talk {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Talk {
    fn start(home: &Path, file: &str, more: &[&str]) -> Talk {
        let embedder = golden().join("tiny-bert").display().to_string();
        let words = [
            "chat",
            "--memory",
            "scm",
            "--memory-file",
            file,
            "--memory-embedder",
            &embedder,
            "--max-tokens",
            "8",
            "--json",
        ];
        let mut child = longspan(home, &[&words, more].concat())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Talk { child, out }
    }

    fn line(&mut self, text: &str) -> Value {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(format!("{text}\n").as_bytes()).unwrap();
        stdin.flush().unwrap();
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("{text}: {line:?}"))
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn a_talk_is_remembered_over_a_kill_and_can_be_shown_and_exported() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("friend.sqlite").display().to_string();
    let mut talk = Talk::start(home.path(), &file, &[]);
    assert_eq!(talk.line("my code is 7731")["turn"], 1);
    assert_eq!(talk.line("it rains")["turn"], 2);
    talk.kill();
    let show = |words: &[&str]| -> (bool, String, String) {
        let all = [&["memory"], words, &["--memory-file", &file]].concat();
        let output = longspan(home.path(), &all).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.success(),
            text(&output.stdout),
            text(&output.stderr),
        )
    };
    let (good, listed, said) = show(&["show"]);
    assert!(good && listed.lines().count() == 3, "{listed}{said}");
    assert!(
        listed.contains("my code is 7731") && said.contains("2 turns, 1 to 2"),
        "{listed}{said}"
    );
    let (good, one, _) = show(&["show", "--turn", "1"]);
    assert!(
        good && one.contains("[Turn 1]") && one.contains("7731"),
        "{one}"
    );
    let (good, _, error) = show(&["show", "--turn", "9"]);
    assert!(
        !good && error.contains("no turn 9") && error.contains("1 to 2"),
        "{error}"
    );
    let (_, newest, _) = show(&["show", "--last", "1"]);
    assert!(
        newest.contains("it rains") && !newest.contains("7731"),
        "{newest}"
    );
    // The talk goes on where it was.
    let mut talk = Talk::start(home.path(), &file, &[]);
    let third = talk.line("what is my code");
    assert_eq!(third["turn"], 3);
    let shown: Vec<u64> = third["activated"]
        .as_array()
        .unwrap()
        .iter()
        .map(|turn| turn["turn"].as_u64().unwrap())
        .collect();
    assert!(shown.iter().all(|turn| (1..3).contains(turn)), "{shown:?}");
    drop(talk.child.stdin.take());
    assert!(talk.child.wait().unwrap().success());
    let export = home.path().join("talk.jsonl").display().to_string();
    assert!(show(&["export", "--out", &export]).0);
    let rows: Vec<Value> = std::fs::read_to_string(&export)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[0]["user"], "my code is 7731");
    assert!(rows[0].get("embedding").is_none());
    let (_, text, _) = show(&["export", "--embeddings"]);
    let row: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert!(row["embedding"].as_array().unwrap().len() > 4);
    // No memory is made by looking for one.
    let none = home.path().join("none.sqlite").display().to_string();
    let output = longspan(home.path(), &["memory", "show", "--memory-file", &none])
        .output()
        .unwrap();
    assert!(!output.status.success() && !Path::new(&none).exists());
    assert!(String::from_utf8_lossy(&output.stderr).contains("none.sqlite"));
}

#[test]
fn a_talk_with_a_server_goes_on_when_the_server_was_killed() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("friend.sqlite").display().to_string();
    let server = Server::start(home.path(), &[]);
    let address = server.address.clone();
    let endpoint = format!("http://{address}/v1");
    let mut talk = Talk::start(home.path(), &file, &["--endpoint", &endpoint]);
    assert_eq!(talk.line("my code is 7731")["turn"], 1);
    server.kill();
    // Another one at the same address; the talk does not notice.
    let server = Server::start(home.path(), &["--listen", &address]);
    assert_eq!(server.address, address);
    let second = talk.line("what is my code");
    assert_eq!(second["turn"], 2);
    // The turn before is always shown, so that the prompt holds it.
    assert!(second["prompt_tokens"].as_u64().unwrap() > 40, "{second}");
    talk.kill();
    // Both gone: what was said is there.
    server.kill();
    let rows = longspan(home.path(), &["memory", "export", "--memory-file", &file])
        .output()
        .unwrap();
    let rows = String::from_utf8(rows.stdout).unwrap();
    assert!(rows.lines().count() == 2 && rows.contains("7731"), "{rows}");
}

#[test]
fn a_folder_is_searched_by_words_and_by_meaning() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("notes");
    std::fs::create_dir(&folder).unwrap();
    let note = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
    note(
        "cache.md",
        "# Cache\n\nThe cache is invalidated by the keeper at midnight.\n",
    );
    note("boats.txt", "Boats leave the harbour in the morning.\n");
    let dir = folder.display().to_string();
    let embedder = golden().join("tiny-bert").display().to_string();
    let search = |words: &[&str]| {
        json_of(
            home.path(),
            &[&["search", &dir], words, &["--json"]].concat(),
        )
    };
    let found = search(&[
        "who invalidated the cache",
        "--retriever",
        "bm25",
        "-k",
        "1",
    ]);
    assert_eq!(found["files"], 2);
    assert_eq!(found["read"], 2);
    let hit = &found["hits"][0];
    assert!(
        hit["document"].as_str().unwrap().contains("cache.md"),
        "{hit}"
    );
    assert!(hit["text"].as_str().unwrap().contains("midnight"));
    assert_eq!(found["hits"].as_array().unwrap().len(), 1);
    // Nothing is read again, vectors are made once.
    let both = search(&["boats in the harbour", "--embedder", &embedder]);
    assert_eq!(
        (&both["read"], &both["embedded"]),
        (&json!(0), &both["passages"])
    );
    let hit = &both["hits"][0];
    assert!(
        hit["document"].as_str().unwrap().contains("boats.txt"),
        "{hit}"
    );
    assert!(hit["bm25_rank"] == 1 && hit["dense_rank"].is_u64(), "{hit}");
    let again = search(&["boats", "--embedder", &embedder, "--retriever", "dense"]);
    assert_eq!((&again["read"], &again["embedded"]), (&json!(0), &json!(0)));
    // What changed is read, what is gone is forgotten.
    note("cache.md", "Nothing of the kind.\n");
    std::fs::remove_file(folder.join("boats.txt")).unwrap();
    let later = search(&["cache boats midnight kind", "--retriever", "bm25"]);
    assert_eq!((&later["read"], &later["removed"]), (&json!(1), &json!(1)));
    assert!(
        later["hits"][0]["text"]
            .as_str()
            .unwrap()
            .contains("Nothing")
    );
    let output = longspan(
        home.path(),
        &["search", "/no/such/folder", "x", "--retriever", "bm25"],
    )
    .output()
    .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("/no/such/folder"));
}
