//! Writes the history: one JSON line an observation, at once, in the order in
//! which things were seen.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use serde_json::Value;

/// The file, for all who see something.
#[derive(Clone, Debug)]
pub struct Writer {
    file: Arc<Mutex<File>>,
    path: Arc<PathBuf>,
}

impl Writer {
    /// A new one.
    pub fn create(path: &Path) -> Self {
        let file = File::options().create_new(true).append(true).open(path).expect("a file in our own folder");
        Self { file: Arc::new(Mutex::new(file)), path: Arc::new(path.to_owned()) }
    }

    /// One line.
    pub fn write(&self, line: &Value) {
        self.append(&format!("{line}\n"));
    }

    /// Lines that others wrote.
    pub fn append(&self, lines: &str) {
        let mut file = self.file.lock().expect("no writer panics");
        file.write_all(lines.as_bytes()).expect("room for the history");
    }

    /// All of it.
    pub fn read(&self) -> String {
        std::fs::read_to_string(&*self.path).expect("the history that we wrote")
    }
}
