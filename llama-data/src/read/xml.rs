//! The little XML the dumps need, from single elements that were cut out of the stream by their tags. Entities other than the five
//! predefined and numeric ones are errors, so none can expand.

use std::collections::BTreeMap;

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// The attributes of an element.
pub(super) fn attributes(element: &BytesStart) -> Result<BTreeMap<String, String>, String> {
    let mut all = BTreeMap::new();
    for attribute in element.attributes() {
        let attribute = attribute.map_err(|error| error.to_string())?;
        let key = attribute.key.as_ref().to_string();
        let value = quick_xml::escape::unescape(&attribute.value).map_err(|error| error.to_string())?;
        all.insert(key, value.into_owned());
    }
    Ok(all)
}

/// The first element of a text that has no children, with its attributes.
pub(super) fn empty_element(xml: &[u8]) -> Result<BTreeMap<String, String>, String> {
    let mut reader = Reader::from_str(utf8(xml)?);
    loop {
        match reader.read_event().map_err(|error| error.to_string())? {
            Event::Empty(element) => return attributes(&element),
            Event::Eof => return Err("no element `<.../>`".into()),
            Event::Text(_) => {}
            _ => return Err("not a single element `<.../>`".into()),
        }
    }
}

/// The texts of an element's descendants by path (`page/title`); of equal paths the last. Attributes stand as `page/redirect@title`.
pub(super) fn texts(xml: &[u8]) -> Result<BTreeMap<String, String>, String> {
    let mut reader = Reader::from_str(utf8(xml)?);
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    let mut path = String::new();
    loop {
        match reader.read_event().map_err(|error| error.to_string())? {
            Event::Start(element) => {
                enter(&mut path, &element);
                found.insert(path.clone(), String::new());
            }
            Event::Empty(element) => {
                let mut inner = path.clone();
                enter(&mut inner, &element);
                for (key, value) in attributes(&element)? {
                    found.insert(format!("{inner}@{key}"), value);
                }
                found.insert(inner, String::new());
            }
            Event::End(_) => path.truncate(path.rfind('/').unwrap_or(0)),
            Event::Text(text) => append(&mut found, &path, &text),
            Event::GeneralRef(name) => {
                let name: &str = &name;
                let text =
                    quick_xml::escape::unescape(&format!("&{name};")).map_err(|error| error.to_string())?.into_owned();
                append(&mut found, &path, &text);
            }
            Event::CData(text) => append(&mut found, &path, &text),
            Event::Eof => return Ok(found),
            _ => {}
        }
    }
}

fn enter(path: &mut String, element: &BytesStart) {
    if !path.is_empty() {
        path.push('/');
    }
    path.push_str(element.name().as_ref());
}

fn append(found: &mut BTreeMap<String, String>, path: &str, text: &str) {
    if let Some(value) = found.get_mut(path) {
        value.push_str(text);
    }
}

fn utf8(xml: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(xml).map_err(|error| format!("not UTF-8 text: {error}"))
}
