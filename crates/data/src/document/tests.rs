//! Each format is read from a sample made in code, each error is provoked, and every parser is fed mutated samples.

use std::fs;
use std::io;
use std::path::Path;

use proptest::prelude::*;

use super::{Document, DocumentError, Format, Limits, from_bytes, join, read, read_all, samples};

const PAGE_ONE: &str = "BT /F1 10 Tf 1 0 0 1 50 700 Tm (Call me) Tj 1 0 0 1 98 700 Tm (Ishmael) Tj \
    1 0 0 1 140 700 Tm (.) Tj 0 -12 Td [(So) -400 (m) 40 (e) -300 (years)] TJ 0 -40 Td (A\\226b) Tj ET";
const PAGE_TWO: &str =
    "q 2 0 0 2 0 0 cm BT /F1 10 Tf 12 TL 50 300 Td (Second) Tj (next) ' ET Q /Loop Do";

fn parse(extension: &str, bytes: &[u8]) -> Result<Document, DocumentError> {
    from_bytes("sample", Some(extension), bytes, &Limits::default())
}

fn text(extension: &str, bytes: &[u8]) -> String {
    parse(extension, bytes).unwrap().text
}

#[test]
fn text_is_decoded_and_its_lines_end_in_lf() {
    assert_eq!(
        text("txt", b"\xef\xbb\xbfone\r\ntwo\rthree"),
        "one\ntwo\nthree"
    );
    let little: Vec<u8> = "\u{feff}h\u{e9}llo \u{1f40b}"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    let big: Vec<u8> = "\u{feff}h\u{e9}llo \u{1f40b}"
        .encode_utf16()
        .flat_map(u16::to_be_bytes)
        .collect();
    assert_eq!(text("txt", &little), "h\u{e9}llo \u{1f40b}");
    assert_eq!(text("txt", &big), "h\u{e9}llo \u{1f40b}");
    let lossy = parse("txt", b"caf\xe9 and na\xefve, the rest is plain").unwrap();
    assert_eq!(
        lossy.text,
        "caf\u{fffd} and na\u{fffd}ve, the rest is plain"
    );
    assert_eq!(
        lossy.warnings,
        ["2 invalid UTF-8 sequences were replaced by U+FFFD"]
    );
    assert_eq!(
        parse("md", b"# T\n\n* x\n").unwrap().source,
        Format::Markdown
    );
}

#[test]
fn format_is_sniffed_without_an_extension() {
    let format = |bytes: &[u8]| {
        from_bytes("-", None, bytes, &Limits::default())
            .unwrap()
            .source
    };
    assert_eq!(format(samples::HTML.as_bytes()), Format::Html);
    assert_eq!(format(&samples::pdf(&[PAGE_ONE])), Format::Pdf);
    assert_eq!(format(&samples::epub(&[])), Format::Epub);
    assert_eq!(format(b"plain"), Format::Text);
}

#[test]
fn html_keeps_blocks_and_drops_scripts() {
    let expected = "# Of Whales\n\nFish & chips cost \u{a3}5 here, said Ahab.\n\n- one\n- two\n  1. inner a\n  2. inner b\n\n\
        Name | Weight\nBlue | 150 t\n\nfn main() {\n    x();\n}\n\nEnd\nline\n";
    assert_eq!(text("html", samples::HTML.as_bytes()), expected);
    let latin = b"<html><head><meta charset=\"iso-8859-1\"></head><body>caf\xe9";
    assert_eq!(text("htm", latin), "caf\u{e9}\n");
    // Depth costs no stack, and hostile nesting does not multiply the text.
    let deep = "<ul><li>".repeat(100_000) + "x";
    assert!(text("html", deep.as_bytes()).len() < 100);
}

#[test]
fn epub_follows_the_spine() {
    let expected = "## Chapter one\n\nIt was late.\n\n## Chapter two\n\nIt was late.\n";
    assert_eq!(text("epub", &samples::epub(&[])), expected);
}

#[test]
fn pdf_text_has_spaces_lines_and_pages() {
    let document = parse("pdf", &samples::pdf(&[PAGE_ONE, PAGE_TWO])).unwrap();
    let (first, second) = document.text.split_once('\x0c').unwrap();
    assert_eq!(first, "Call me Ishmael.\nSo me years\n\nA\u{2013}b\n");
    assert!(second.starts_with("Second\nnext\n"), "{second:?}");
    assert!(second.contains("form"), "{second:?}");
    assert_eq!(document.source, Format::Pdf);
}

#[test]
fn pdf_with_a_damaged_index_is_rebuilt_with_a_warning() {
    let whole = samples::pdf(&[PAGE_ONE]);
    let at = super::find(&whole, b"startxref").unwrap();
    let damaged = [&whole[..at], b"startxref\n7\n%%EOF\n"].concat();
    let document = parse("pdf", &damaged).unwrap();
    assert_eq!(document.text, text("pdf", &whole));
    assert!(
        document.warnings[0].contains("rebuilt"),
        "{:?}",
        document.warnings
    );
}

#[test]
fn pdf_locked_only_against_changes_opens() {
    assert_eq!(text("pdf", &samples::encrypted_pdf("")).trim(), "secret");
}

/// Writes `files` below a new folder.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (path, bytes) in files {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    folder
}

#[test]
fn tree_is_read_in_path_order_without_what_git_ignores() {
    let folder = folder(&[
        ("src/main.rs", b"fn main() {}"),
        ("src/b/deep.rs", b"// deep\r\n"),
        ("README.md", b"# Read me\n"),
        (".gitignore", b"*.log\n/secret/\n"),
        ("noise.log", b"noise"),
        ("secret/key", b"key"),
        (".hidden", b"hidden"),
        ("target/debug/out.txt", b"built"),
        ("data.bin", b"\0\x01\x02\0\0\0\0\0"),
        ("empty.txt", b""),
        ("page.html", b"<p>kept as source</p>\n"),
    ]);
    let document = read(folder.path(), &Limits::default()).unwrap();
    let expected = "=== README.md ===\n# Read me\n=== page.html ===\n<p>kept as source</p>\n\
        === src/b/deep.rs ===\n// deep\n=== src/main.rs ===\nfn main() {}";
    assert_eq!(document.text, expected);
    assert_eq!(document.source, Format::Tree);
    assert_eq!(
        document.warnings,
        ["binary files left out: 1, the first of them data.bin"]
    );
    assert_eq!(read(folder.path(), &Limits::default()).unwrap(), document);
    let error = read(folder.path(), &Limits::with_max_bytes(20)).unwrap_err();
    assert!(
        matches!(error, DocumentError::TooLong { limit: 20, .. }),
        "{error}"
    );
    let nothing = tempfile::tempdir().unwrap();
    let error = read(nothing.path(), &Limits::default()).unwrap_err();
    assert!(
        matches!(
            error,
            DocumentError::Empty {
                format: Format::Tree,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn several_documents_are_joined_under_headers() {
    let folder = folder(&[("a.txt", b"A"), ("b.md", b"B\n")]);
    let paths = [folder.path().join("a.txt"), folder.path().join("b.md")];
    let documents = read_all(&paths, &Limits::default()).unwrap();
    let [a, b] = paths.each_ref().map(|path| path.display().to_string());
    assert_eq!(
        join(&documents),
        format!("=== {a} ===\nA\n=== {b} ===\nB\n")
    );
    assert_eq!(join(&documents[..1]), "A");
    let error = read_all(&paths, &Limits::with_max_bytes(2)).unwrap_err();
    assert!(
        matches!(
            error,
            DocumentError::TooLong {
                found: 3,
                limit: 2,
                ..
            }
        ),
        "{error}"
    );
    let error = read_all(&["-", "-"], &Limits::default()).unwrap_err();
    assert!(
        matches!(error, DocumentError::StdinTwice { count: 2 }),
        "{error}"
    );
}

#[test]
fn system_errors_are_typed() {
    let error = read(Path::new("/no/such/book.txt"), &Limits::default()).unwrap_err();
    assert!(matches!(error, DocumentError::Missing { .. }), "{error}");
    assert!(error.to_string().contains("/no/such/book.txt"));
    let error = DocumentError::from_io(
        Path::new("locked.txt"),
        io::ErrorKind::PermissionDenied.into(),
    );
    assert!(
        matches!(error, DocumentError::PermissionDenied { .. }),
        "{error}"
    );
    let error = DocumentError::from_io(Path::new("bad.txt"), io::Error::other("disk on fire"));
    assert!(error.to_string().contains("disk on fire"), "{error}");
}

#[cfg(unix)]
#[test]
fn unreadable_file_is_permission_denied() {
    use std::os::unix::fs::PermissionsExt;
    let folder = folder(&[("locked.txt", b"locked")]);
    let path = folder.path().join("locked.txt");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
    // The superuser reads it all the same.
    match read(&path, &Limits::default()) {
        Ok(document) => assert!(fs::File::open(&path).is_ok() && document.text == "locked"),
        Err(error) => assert!(
            matches!(error, DocumentError::PermissionDenied { .. }),
            "{error}"
        ),
    }
}

#[test]
fn empty_and_binary_are_refused() {
    for (extension, bytes) in [("txt", &b" \n\t"[..]), ("html", b"<p> </p>"), ("txt", b"")] {
        let error = parse(extension, bytes).unwrap_err();
        assert!(matches!(error, DocumentError::Empty { .. }), "{error}");
    }
    let error = parse("txt", b"head\0\0\0\0\0\0").unwrap_err();
    assert!(
        matches!(
            error,
            DocumentError::Binary {
                offset: 4,
                byte: 0,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("offset 4"));
}

#[test]
fn unsupported_formats_list_the_known_ones() {
    let folder = folder(&[("report.docx", b"PK")]);
    let error = read(&folder.path().join("report.docx"), &Limits::default()).unwrap_err();
    assert!(
        matches!(error, DocumentError::Unsupported { .. }),
        "{error}"
    );
    assert!(
        error.to_string().contains("epub") && error.to_string().contains("Word"),
        "{error}"
    );
    let error = from_bytes("-", None, b"PK\x03\x04 anything", &Limits::default()).unwrap_err();
    assert!(
        matches!(error, DocumentError::Unsupported { .. }),
        "{error}"
    );
    let error = from_bytes("-", None, b"\x89PNG\r\n", &Limits::default()).unwrap_err();
    assert!(error.to_string().contains("PNG"), "{error}");
}

#[test]
fn encrypted_books_are_refused() {
    let error = parse("pdf", &samples::encrypted_pdf("user")).unwrap_err();
    assert!(
        matches!(
            error,
            DocumentError::Encrypted {
                format: Format::Pdf,
                ..
            }
        ),
        "{error}"
    );
    let listed = br#"<encryption><CipherReference URI="OEBPS/text/b.xhtml"/></encryption>"#;
    let error = parse(
        "epub",
        &samples::epub(&[("META-INF/encryption.xml", listed)]),
    )
    .unwrap_err();
    assert!(
        matches!(
            error,
            DocumentError::Encrypted {
                format: Format::Epub,
                ..
            }
        ),
        "{error}"
    );
    // Fonts may be obfuscated without locking the text.
    let font = br#"<encryption><CipherReference URI="OEBPS/font.otf"/></encryption>"#;
    assert!(parse("epub", &samples::epub(&[("META-INF/encryption.xml", font)])).is_ok());
}

#[test]
fn truncated_and_malformed_books_are_refused() {
    for (extension, bytes) in [
        ("pdf", samples::pdf(&[PAGE_ONE])),
        ("epub", samples::epub(&[])),
    ] {
        let error = parse(extension, &bytes[..bytes.len() / 2]).unwrap_err();
        assert!(matches!(error, DocumentError::Truncated { .. }), "{error}");
        let error = parse(extension, b"not that at all").unwrap_err();
        assert!(matches!(error, DocumentError::Malformed { .. }), "{error}");
    }
    let error = parse("epub", &samples::zip(&[("OEBPS/a.xhtml", b"<p>x</p>")])).unwrap_err();
    assert!(matches!(error, DocumentError::Malformed { .. }), "{error}");
}

#[test]
fn bombs_stop_at_the_limit() {
    let limits = Limits {
        max_bytes: 1 << 20,
        max_expanded_bytes: 1 << 20,
    };
    let long = "x ".repeat(1 << 20);
    let container = samples::CONTAINER.as_bytes();
    let package = samples::PACKAGE.as_bytes();
    let bomb = samples::zip(&[
        ("META-INF/container.xml", container),
        ("OEBPS/content.opf", package),
        ("OEBPS/text/b.xhtml", long.as_bytes()),
    ]);
    assert!(bomb.len() < 1 << 16);
    let error = from_bytes("bomb.epub", Some("epub"), &bomb, &limits).unwrap_err();
    assert!(
        matches!(error, DocumentError::ExpandsTooFar { limit: 1048576, .. }),
        "{error}"
    );
    let content = format!("BT /F1 10 Tf ({long}) Tj ET");
    let bomb = samples::pdf(&[&content]);
    assert!(bomb.len() < 1 << 16);
    let error = from_bytes("bomb.pdf", Some("pdf"), &bomb, &limits).unwrap_err();
    assert!(
        matches!(
            error,
            DocumentError::ExpandsTooFar {
                format: Format::Pdf,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn over_long_file_is_refused_from_its_metadata() {
    let folder = folder(&[]);
    let path = folder.path().join("sparse.txt");
    fs::File::create(&path).unwrap().set_len(2 << 30).unwrap();
    let error = read(&path, &Limits::default()).unwrap_err();
    assert!(
        matches!(
            error,
            DocumentError::TooLong {
                found: 0x8000_0000,
                limit: 0x4000_0000,
                ..
            }
        ),
        "{error}"
    );
    assert!(
        error.to_string().contains("--max-bytes 2147483648"),
        "{error}"
    );
}

#[test]
fn scanned_pdf_says_so() {
    let error = parse("pdf", &samples::pdf(&["0 0 m 10 10 l S", ""])).unwrap_err();
    assert!(
        matches!(error, DocumentError::NoText { pages: 2, .. }),
        "{error}"
    );
}

/// The sample with `entries` set in its font.
fn pdf_with_font(entries: lopdf::Dictionary, without: &[u8]) -> Vec<u8> {
    let mut pdf = samples::pdf_document(&["BT /F1 10 Tf (ABCD) Tj ET"]);
    let file = pdf.add_object(lopdf::Stream::new(lopdf::dictionary! {}, b"font".to_vec()));
    let descriptor =
        pdf.add_object(lopdf::dictionary! { "Type" => "FontDescriptor", "FontFile" => file });
    let fonts = pdf
        .objects
        .values_mut()
        .filter_map(|object| object.as_dict_mut().ok());
    let font = fonts
        .into_iter()
        .find(|dict| dict.has_type(b"Font"))
        .unwrap();
    font.remove(without);
    for (key, value) in entries {
        font.set(key, value);
    }
    font.set("FontDescriptor", descriptor);
    samples::save(pdf)
}

#[test]
fn pdf_fonts_without_a_map_to_unicode_are_reported() {
    let guessed = parse("pdf", &pdf_with_font(lopdf::dictionary! {}, b"Encoding")).unwrap();
    assert_eq!(guessed.text, "ABCD\n");
    assert!(
        guessed.warnings[0].contains("Courier"),
        "{:?}",
        guessed.warnings
    );
    // Glyph numbers would come out as made-up letters.
    let composite = lopdf::dictionary! { "Subtype" => "Type0", "Encoding" => "Identity-H" };
    let error = parse("pdf", &pdf_with_font(composite, b"Widths")).unwrap_err();
    assert!(
        matches!(error, DocumentError::NoText { pages: 1, .. }),
        "{error}"
    );
}

/// Overwrites, removes and repeats pieces of `bytes`.
fn mutate(mut bytes: Vec<u8>, edits: &[(usize, u8, u8)]) -> Vec<u8> {
    for &(at, kind, byte) in edits {
        if bytes.is_empty() {
            break;
        }
        let at = at % bytes.len();
        match kind % 4 {
            0 => bytes[at] = byte,
            1 => drop(bytes.drain(at..(at + usize::from(byte)).min(bytes.len()))),
            2 => bytes.insert(at, byte),
            _ => {
                let piece = bytes[at..(at + usize::from(byte)).min(bytes.len())].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// A parser given damaged input returns: text that keeps the promises of `Document`, or an error.
    #[test]
    fn parsers_survive_mutated_samples(edits in prop::collection::vec((any::<usize>(), any::<u8>(), any::<u8>()), 1..12)) {
        let limits = Limits::with_max_bytes(1 << 22);
        let samples = [
            ("html", samples::HTML.as_bytes().to_vec()),
            ("epub", samples::epub(&[])),
            ("pdf", samples::pdf(&[PAGE_ONE, PAGE_TWO])),
            ("txt", "h\u{e9}llo\r\n".repeat(20).into_bytes()),
        ];
        for (extension, bytes) in samples {
            if let Ok(document) = from_bytes("mutated", Some(extension), &mutate(bytes, &edits), &limits) {
                prop_assert!(!document.text.trim().is_empty());
                prop_assert!(extension == "html" || !document.text.contains('\r'));
            }
        }
    }

    /// Damage inside a sound file, where compression and checksums cannot hide it from the inner parsers.
    #[test]
    fn inner_parsers_survive_mutated_content(edits in prop::collection::vec((any::<usize>(), any::<u8>(), any::<u8>()), 1..12)) {
        let damaged = |content: &str| mutate(content.as_bytes().to_vec(), &edits);
        let page = String::from_utf8_lossy(&damaged(PAGE_ONE)).into_owned();
        let books = [
            ("pdf", samples::pdf(&[&page])),
            ("epub", samples::zip(&[
                ("META-INF/container.xml", samples::CONTAINER.as_bytes()),
                ("OEBPS/content.opf", samples::PACKAGE.as_bytes()),
                ("OEBPS/text/b.xhtml", &damaged(samples::HTML)),
            ])),
            ("epub", samples::epub_with_package(&damaged(samples::PACKAGE))),
        ];
        for (extension, bytes) in books {
            if let Ok(document) = from_bytes("mutated", Some(extension), &bytes, &Limits::with_max_bytes(1 << 22)) {
                prop_assert!(!document.text.trim().is_empty());
            }
        }
    }

    #[test]
    fn parsers_survive_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        for extension in ["html", "epub", "pdf", "txt"] {
            for head in [&b""[..], b"%PDF-1.5\n", b"PK\x03\x04"] {
                let bytes = [head, &bytes, b"PK\x05\x06 startxref\n0\n%%EOF"].concat();
                if let Ok(document) = from_bytes("any", Some(extension), &bytes, &Limits::default()) {
                    prop_assert!(!document.text.trim().is_empty());
                }
            }
        }
    }
}
