//! Sample documents for the tests, made here so that the repository carries no binaries.

use std::io::{Cursor, Write};

use lopdf::{EncryptionState, EncryptionVersion, Object, Permissions, Stream, dictionary};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// A page with headings, lists, a table, `pre`, entities, and what must not be seen.
pub const HTML: &str = "<!DOCTYPE html><html><head><meta charset=utf-8><title>Hidden title</title>\
    <style>p { color: red }</style><script>if (1 < 2) alert('<p>no</p>')</script></head><body>\
    <h1>Of  Whales</h1><p>Fish &amp; chips cost &pound;5&nbsp;here,\n said <b>A</b>hab.</p>\
    <ul><li>one<li>two<ol><li>inner a</li><li>inner b</li></ol></ul>\
    <table><tr><th>Name</th><th>Weight</th></tr><tr><td><p>Blue</p></td><td>150 t</td></tr></table>\
    <pre>\nfn main() {\n    x();\n}</pre><p>End<br>line</body></html>";

pub const CONTAINER: &str = r#"<?xml version="1.0"?><container version="1.0"
    xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>
    <rootfile full-path="OEBPS/content.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"#;

/// The spine's order differs from that of the names and of the manifest.
pub const PACKAGE: &str = r#"<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0">
    <manifest><item id="a" href="text/a%20one.xhtml" media-type="application/xhtml+xml"/>
    <item id="b" href="text/b.xhtml" media-type="application/xhtml+xml"/></manifest>
    <spine><itemref idref="b"/><itemref idref="a"/></spine></package>"#;

/// A ZIP whose first entry is the stored `mimetype` of an EPUB.
pub fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    let options = |method| SimpleFileOptions::default().compression_method(method);
    writer
        .start_file("mimetype", options(CompressionMethod::Stored))
        .unwrap();
    writer.write_all(b"application/epub+zip").unwrap();
    for (name, bytes) in entries {
        writer
            .start_file(*name, options(CompressionMethod::Deflated))
            .unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

/// A book of two chapters, and further entries.
pub fn epub(further: &[(&str, &[u8])]) -> Vec<u8> {
    book(PACKAGE.as_bytes(), further)
}

/// That book with another package document.
pub fn epub_with_package(package: &[u8]) -> Vec<u8> {
    book(package, &[])
}

fn book(package: &[u8], further: &[(&str, &[u8])]) -> Vec<u8> {
    let chapter = |text: &str| {
        format!(
            "<?xml version=\"1.0\"?><html xmlns=\"http://www.w3.org/1999/xhtml\"><head><title/>\
             <script src=\"x.js\"/></head><body><h2>{text}</h2><p>It was&#160;late.</p></body></html>"
        )
    };
    let (first, last) = (chapter("Chapter one"), chapter("Chapter two"));
    let mut entries: Vec<(&str, &[u8])> = vec![
        ("META-INF/container.xml", CONTAINER.as_bytes()),
        ("OEBPS/content.opf", package),
        ("OEBPS/text/a one.xhtml", last.as_bytes()),
        ("OEBPS/text/b.xhtml", first.as_bytes()),
    ];
    entries.extend_from_slice(further);
    zip(&entries)
}

/// One page per content stream, in Courier with its true width of 600; `/Loop` is a form that draws itself.
pub fn pdf_document(pages: &[&str]) -> lopdf::Document {
    let mut pdf = lopdf::Document::with_version("1.5");
    let tree = pdf.new_object_id();
    let widths: Vec<Object> = (32..=126).map(|_| 600.into()).collect();
    let font = pdf.add_object(dictionary! {
        "Type" => "Font", "Subtype" => "Type1", "BaseFont" => "Courier", "Encoding" => "WinAnsiEncoding",
        "FirstChar" => 32, "LastChar" => 126, "Widths" => widths,
    });
    let form = pdf.new_object_id();
    let resources = pdf.add_object(dictionary! {
        "Font" => dictionary! { "F1" => font },
        "XObject" => dictionary! { "Loop" => form },
    });
    let drawn = b"BT /F1 10 Tf 1 0 0 1 10 400 Tm (form) Tj ET /Loop Do /Loop Do".to_vec();
    let header = dictionary! { "Type" => "XObject", "Subtype" => "Form", "Resources" => resources };
    pdf.objects.insert(form, Stream::new(header, drawn).into());
    let kids: Vec<Object> = pages
        .iter()
        .map(|content| {
            let content = pdf.add_object(Stream::new(dictionary! {}, content.as_bytes().to_vec()));
            pdf.add_object(
                dictionary! { "Type" => "Page", "Parent" => tree, "Contents" => content },
            )
            .into()
        })
        .collect();
    let media: Vec<Object> = [0, 0, 595, 842].map(Object::from).to_vec();
    let count = kids.len() as i64;
    let node = dictionary! {
        "Type" => "Pages", "Kids" => kids, "Count" => count, "Resources" => resources, "MediaBox" => media,
    };
    pdf.objects.insert(tree, node.into());
    let catalog = pdf.add_object(dictionary! { "Type" => "Catalog", "Pages" => tree });
    pdf.trailer.set("Root", catalog);
    pdf
}

pub fn pdf(pages: &[&str]) -> Vec<u8> {
    save(pdf_document(pages))
}

pub fn save(mut pdf: lopdf::Document) -> Vec<u8> {
    let mut bytes = Vec::new();
    pdf.compress();
    pdf.save_to(&mut bytes).unwrap();
    bytes
}

/// A PDF that opens with `password`.
pub fn encrypted_pdf(password: &str) -> Vec<u8> {
    let mut pdf = pdf_document(&["BT /F1 10 Tf (secret) Tj ET"]);
    let id = Object::string_literal("0123456789abcdef");
    pdf.trailer.set("ID", vec![id.clone(), id]);
    let version = EncryptionVersion::V2 {
        document: &pdf,
        owner_password: "owner",
        user_password: password,
        key_length: 128,
        permissions: Permissions::all(),
    };
    let state = EncryptionState::try_from(version).unwrap();
    pdf.encrypt(&state).unwrap();
    let mut bytes = Vec::new();
    pdf.save_to(&mut bytes).unwrap();
    bytes
}
