//! Preparing data as a user does, and what is left of real markup.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use llama::data::DataError;
use llama::data::clean::html::Html;
use llama::data::clean::latex::Arxiv;
use llama::data::clean::wikitext::Wikipedia;
use llama::data::clean::{Clean, Tally};
use llama::data::input::Limits;
use llama::data::read::Format;
use llama::data::source::{Document, Sources};

use crate::programs::{program, run};
use crate::support::{data, fixture};

/// Dumps in small, in the forms they come in, and a configuration that names them all.
fn dumps(folder: &Path) -> PathBuf {
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    };
    let gz = |text: &str| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    };
    let sentence = |seed: usize| {
        let words =
            ["house", "river", "walks", "under", "green", "seven", "people", "write", "letters", "about", "music"];
        let all: Vec<&str> =
            (0..9).map(|index| words[(seed * 31 + index * index * 7 + seed / 3) % words.len()]).collect();
        format!("The {} of {} {}.", all.join(" "), words[seed % 11], words[(seed / 11) % 11])
    };
    let prose = |seed: usize| (0..8).map(|index| sentence(seed * 8 + index)).collect::<Vec<_>>().join(" ");

    let (mut wet, mut c4, mut wiki, mut posts) = (String::new(), String::new(), String::new(), String::new());
    for index in 0..150 {
        let body = format!("Menu\n{}\nCopyright 2020", prose(index));
        let length = body.len();
        wet += &format!("WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: {length}\r\n\r\n{body}\r\n\r\n");
        c4 += &format!("{{\"text\": \"{}\\nno end\", \"url\": \"http://{index}\"}}\n", prose(1000 + index));
        wiki += &format!(
            "<page>\n<title>T{index}</title>\n<ns>0</ns>\n<revision><text>'''T''' [[a|b]] {}{{{{cite}}}}</text></revision>\n</page>\n",
            prose(2000 + index)
        );
        posts += &format!(
            "<row Id=\"{}\" PostTypeId=\"1\" Title=\"Q\" Body=\"&lt;p&gt;{}&lt;/p&gt;\" />\n",
            2 * index + 1,
            prose(3000 + index)
        );
        posts += &format!(
            "<row Id=\"{}\" PostTypeId=\"2\" ParentId=\"{}\" Score=\"1\" Body=\"{}\" />\n",
            2 * index + 2,
            2 * index + 1,
            prose(4000 + index)
        );
        write(
            &format!("github/src/{index}.rs"),
            format!("/// {}\nfn f{}() {{}}\n", sentence(index % 140), index % 140).as_bytes(),
        );
        let book: Vec<String> = (0..20).map(|part| prose(5000 + 20 * (index % 30) + part)).collect();
        write(&format!("books/{index}.txt"), book.join("\n").as_bytes());
    }
    write("cc/a.warc.wet.gz", &gz(&wet));
    write("c4/a.json.gz", &gz(&c4));
    write("wiki.xml", wiki.as_bytes());
    write("Posts.xml", posts.as_bytes());
    write("github/Cargo.toml", b"[package]\nlicense = \"MIT\"\n");
    let paper = format!(
        "\\documentclass{{a}}\\newcommand{{\\R}}{{\\mathbb{{R}}}}\\begin{{document}}\\section{{One}}{} $\\R$\\end{{document}}",
        prose(6000)
    );
    write("arxiv/1/main.tex", paper.as_bytes());

    let source = |name: &str, recipe: &str, path: &str, weight: f64| {
        format!("[[source]]\nname = \"{name}\"\nrecipe = \"{recipe}\"\npaths = [\"{path}\"]\nweight = {weight}\n")
    };
    // The models of CommonCrawl's recipe are for a user to train: its other rules are named instead.
    let sources = [
        source("commoncrawl", "commoncrawl", "cc", 67.0)
            + "steps = [{ rule = \"duplicate_lines\" }, { rule = \"length\", min_chars = 20 }]\n",
        source("c4", "c4", "c4", 15.0),
        source("github", "github", "github", 4.5),
        source("wikipedia", "wikipedia", "wiki.xml", 4.5),
        source("books", "books", "books", 4.5),
        source("arxiv", "arxiv", "arxiv", 2.5),
        source("stackexchange", "stackexchange", "Posts.xml", 2.0),
    ];
    let text = format!(
        "output = \"out\"\nshard_bytes = 4000\nvalid_fraction = 0.05\n[tokenizer]\nvocab_size = 340\n{}",
        sources.concat()
    );
    write("prepare.toml", text.as_bytes());
    folder.join("prepare.toml")
}

/// All files of a folder but the plans, which hold its path.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(inner) = open.pop() {
        for entry in std::fs::read_dir(inner).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            // What a killed process was writing stays behind under a name of its own.
            if path.is_dir() {
                open.push(path);
            } else if name != "plan.json" && !name.starts_with(".tmp-") {
                found.insert(path.strip_prefix(folder).unwrap().into(), std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

#[test]
fn tables_of_the_hub_are_text() {
    let read = |name: &str| -> Result<Vec<Document>, DataError> {
        let files = Sources::new([fixture("hub").join(name)]).files()?;
        files[0].documents()?.collect()
    };
    let documents = read("text.parquet").unwrap();
    assert_eq!(
        documents.iter().map(|document| document.text.as_str()).collect::<Vec<_>>(),
        ["One text.", "Another, ä."]
    );
    assert_eq!((documents[0].meta["url"].as_str(), documents[1].meta.get("url")), ("http://a", None));
    let error = read("zstd.parquet").unwrap_err().to_string();
    assert!(error.contains("zstd.parquet") && error.to_lowercase().contains("zstd"), "{error}");
    let error = read("arc.parquet").unwrap_err().to_string();
    assert!(error.contains("row 1") && error.contains("`text`"), "{error}");
}

#[test]
fn prepare_survives_kills_and_pretrain_reads_the_mixture() {
    let folder = tempfile::tempdir().unwrap();
    let config = dumps(folder.path());
    let prepare = || {
        let mut command = program("prepare");
        command.arg("run").arg(&config);
        command
    };
    let out = run(&mut prepare());
    for name in
        ["commoncrawl", "stackexchange", "duplicates: near", "duplicates: document", "c4: no terminal punctuation"]
    {
        assert!(out.contains(name), "{name}: {out}");
    }
    let output = folder.path().join("out");
    let expected = files(&output);
    assert!(String::from_utf8_lossy(&expected[Path::new("report.html")]).contains("duplicates: near"));

    // Killed at many moments, then left alone: every file is as if nothing had happened.
    std::fs::remove_dir_all(&output).unwrap();
    for round in 0..8u64 {
        let mut child = prepare().stdout(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(15 + 40 * round));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    run(&mut prepare());
    let found = files(&output);
    let names: Vec<_> =
        found.keys().chain(expected.keys()).filter(|path| found.get(*path) != expected.get(*path)).collect();
    assert!(names.is_empty(), "{names:?}");

    let run_folder = folder.path().join("run");
    let mut pretrain = program("pretrain");
    pretrain.args(["--seq-len", "32", "--sequences", "4", "--steps", "6", "--warmup", "2", "--peak-gflops", "100"]);
    pretrain.arg("--data").arg(&output).arg("--run").arg(&run_folder);
    let out = run(&mut pretrain);
    assert!(out.contains("commoncrawl 0.") || out.contains("commoncrawl 1."), "{out}");
}

/// Cleans a real file and returns the documents.
fn clean(path: &Path, format: Format, rule: &dyn Clean) -> Vec<String> {
    let records = format.read(path, Limits::default()).unwrap();
    let mut tally = Tally::default();
    records.filter_map(|record| rule.clean(record.unwrap(), &mut tally)).map(|document| document.text).collect()
}

/// Where any of the marks is left, with its surroundings.
fn leftovers(texts: &[String], marks: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for text in texts {
        for mark in marks {
            for (at, _) in text.match_indices(mark) {
                let (start, end) = (text.floor_char_boundary(at.saturating_sub(30)), text.ceil_char_boundary(at + 30));
                found.push(text[start..end].replace('\n', "⏎"));
            }
        }
    }
    found
}

#[test]
fn no_markup_is_left_of_real_pages() {
    if let Some(path) = data("clean/enwiki_pages_articles_shortened.xml.bz2") {
        let texts = clean(&path, Format::MediaWiki, &Wikipedia::default());
        assert_eq!(texts.len(), 106);
        // A formula may hold brackets.
        let texts: Vec<String> =
            texts.iter().map(|text| text.split('$').step_by(2).collect::<Vec<_>>().join("$")).collect();
        let marks = [
            "{{", "}}", "[[", "]]", "{|", "|}", "'''", "<ref", "</", "<br", "&nbsp;", "&amp;", "[http", "==", "__",
            "thumb|",
        ];
        assert_eq!(leftovers(&texts, &marks), [""; 0]);
    }
    if let Some(path) = data("clean/coffee_stackexchange_Posts.xml") {
        let texts = clean(&path, Format::StackExchange, &Html);
        assert_eq!(texts.len(), 225);
        assert_eq!(leftovers(&texts, &["<p>", "</", "<a ", "<li", "<br", "&lt;", "&amp;", "&quot;", "&#"]), [""; 0]);
    }
    if let Some(path) = data("clean/hott_book_tex") {
        let texts = clean(&path, Format::Latex, &Arxiv::default());
        assert_eq!(texts.len(), 1);
        assert!(texts[0].starts_with("\\chapter*{Introduction}"), "{}", &texts[0][..200]);
        let comments = texts[0].lines().filter(|line| line.trim_start().starts_with('%')).count();
        assert_eq!(comments, 0);
        // Macros of the book with no, one and two arguments are expanded.
        let marks = [
            "\\newcommand",
            "\\jdeq",
            "\\defeq",
            "\\define{",
            "\\bibliography",
            "\\begin{thebibliography}",
            "\\xspace",
        ];
        assert_eq!(leftovers(&texts, &marks), [""; 0]);
    }
}
