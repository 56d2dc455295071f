//! Names that Wikipedia's markup gives a meaning, in the paper's languages.

/// Elements that go with what they hold.
#[rustfmt::skip]
pub(super) const DROPPED: [&str; 12] = [
    "ref", "gallery", "timeline", "imagemap", "score", "graph", "mapframe", "maplink", "templatestyles",
    "references", "hiero", "inputbox",
];

/// First words of the sections without prose of their own, in the paper's languages.
#[rustfmt::skip]
pub(super) const TAIL_SECTIONS: [&str; 76] = [
    "references", "external links", "see also", "further reading", "notes", "footnotes", "bibliography", "sources",
    "notes and references", "citations", "gallery", "works cited", "einzelnachweise", "weblinks", "literatur",
    "siehe auch", "références", "notes et références", "liens externes", "voir aussi", "bibliographie", "annexes",
    "referencias", "enlaces externos", "véase también", "bibliografía", "note", "collegamenti esterni",
    "voci correlate", "altri progetti", "bibliografia", "referências", "ligações externas", "ver também", "notas",
    "примечания", "ссылки", "литература", "см. также", "источники", "примітки", "посилання", "джерела",
    "див. також", "література", "przypisy", "linki zewnętrzne", "zobacz też", "referenties", "externe links",
    "zie ook", "externe link", "referenser", "externa länkar", "se även", "källor", "referencer",
    "eksterne henvisninger", "se også", "kilder", "reference", "externí odkazy", "související články", "literatura",
    "referències", "enllaços externs", "vegeu també", "izvori", "vanjske poveznice", "вижте също",
    "външни препратки", "източници", "jegyzetek", "további információk", "legături externe", "спољашње везе",
];

/// Names of the namespaces of files and categories, in the paper's languages.
#[rustfmt::skip]
pub(super) const HIDDEN_LINKS: [&str; 43] = [
    "file", "image", "category", "media", "datei", "bild", "kategorie", "fichier", "catégorie", "archivo", "imagen",
    "categoría", "immagine", "categoria", "ficheiro", "imagem", "bestand", "afbeelding", "categorie", "plik",
    "grafika", "kategoria", "файл", "изображение", "категория", "категорія", "зображення", "fil", "kategori",
    "soubor", "fitxer", "imatge", "datoteka", "slika", "kategorija", "датотека", "слика", "категорија", "fájl",
    "kép", "kategória", "fișier", "imagine",
];
