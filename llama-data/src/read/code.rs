//! Source files with the licence of the package they belong to: the nearest manifest or licence file above them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};

use super::{Record, whole_file};
use crate::input::Limits;

/// Folders above a file that are searched.
const MAX_DEPTH: usize = 12;

pub(super) fn read(path: &Path, limits: Limits) -> Record {
    let mut document = whole_file(path, limits)?;
    if let Some(licence) = path.parent().and_then(|folder| licence_of(folder, MAX_DEPTH)) {
        document.meta.insert("license".into(), licence);
    }
    document.meta.insert("path".into(), path.display().to_string());
    Ok(document)
}

/// The licence of a folder's package as an SPDX expression, if one is named there or above.
fn licence_of(folder: &Path, depth: usize) -> Option<String> {
    static KNOWN: LazyLock<Mutex<HashMap<PathBuf, Option<String>>>> = LazyLock::new(Default::default);
    let lock = || KNOWN.lock().unwrap_or_else(|error| error.into_inner());
    if depth == 0 {
        return None;
    }
    if let Some(known) = lock().get(folder) {
        return known.clone();
    }
    let licence = stated_in(folder).or_else(|| licence_of(folder.parent()?, depth - 1));
    let mut known = lock();
    if known.len() > 1 << 16 {
        known.clear();
    }
    known.insert(folder.into(), licence.clone());
    licence
}

fn stated_in(folder: &Path) -> Option<String> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let manifest = read("Cargo.toml")
        .and_then(|text| {
            let table: toml::Table = toml::from_str(&text).ok()?;
            Some(table.get("package")?.get("license")?.as_str()?.to_string())
        })
        .or_else(|| {
            let package: serde_json::Value = serde_json::from_str(&read("package.json")?).ok()?;
            Some(package.get("license")?.as_str()?.to_string())
        });
    manifest.or_else(|| {
        let mut names: Vec<_> = std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
        names.sort();
        names.iter().find_map(|path| {
            let name = path.file_name()?.to_string_lossy().to_ascii_uppercase();
            let named = ["LICENSE", "LICENCE", "COPYING", "UNLICENSE"].iter().any(|start| name.starts_with(start));
            (named && path.is_file()).then(|| recognise(&std::fs::read_to_string(path).ok()?))?
        })
    })
}

/// The licence of a text that is known by a sentence of its own.
fn recognise(text: &str) -> Option<String> {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
    let known = [
        ("gnu affero general public license", "AGPL-3.0"),
        ("gnu lesser general public license", "LGPL-3.0"),
        ("gnu general public license", "GPL-3.0"),
        ("mozilla public license", "MPL-2.0"),
        ("apache license version 2.0", "Apache-2.0"),
        ("apache license, version 2.0", "Apache-2.0"),
        ("permission is hereby granted, free of charge, to any person obtaining a copy of this software", "MIT"),
        ("redistribution and use in source and binary forms", "BSD-3-Clause"),
        ("this is free and unencumbered software", "Unlicense"),
        ("permission to use, copy, modify, and/or distribute this software", "ISC"),
    ];
    known.iter().find(|(sentence, _)| words.contains(sentence)).map(|(_, name)| name.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_package_names_the_licence() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("crate/src");
        std::fs::create_dir_all(&inner).unwrap();
        std::fs::write(folder.path().join("COPYING"), "GNU GENERAL PUBLIC LICENSE\nVersion 3").unwrap();
        std::fs::write(folder.path().join("crate/Cargo.toml"), "[package]\nlicense = \"MIT OR Apache-2.0\"").unwrap();
        std::fs::write(inner.join("lib.rs"), "fn a() {}").unwrap();
        std::fs::write(folder.path().join("main.c"), "int main;").unwrap();
        let licence = |path: &Path| read(path, Limits::default()).unwrap().meta["license"].clone();
        assert_eq!(licence(&inner.join("lib.rs")), "MIT OR Apache-2.0");
        assert_eq!(licence(&folder.path().join("main.c")), "GPL-3.0");
    }
}
