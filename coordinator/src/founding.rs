//! A fleet's first coordinator makes its folder, its CA and its store; a further one joins them.

use std::{fs, io, path::Path};

use crate::{
    config::Init,
    folder::{self, Folder, Marker, StoreKind},
    hex,
    identity::Authority,
    server::Error,
    store::{
        EmbeddedStore,
        postgres::{self, Target},
    },
    tokens::random,
};

/// Makes a fleet in a folder that has none, or the folder of a further coordinator.
///
/// # Errors
/// There is one, or the folder or the store cannot be written.
pub fn init(settings: &Init) -> Result<Marker, Error> {
    let folder = Folder::take(&settings.data)?;
    if let Some(marker) = folder.marker()? {
        return Err(folder::Error::Exists { folder: settings.data.display().to_string(), fleet: marker.fleet }.into());
    }
    let place = Place::new(settings.store.as_deref(), settings.store_ca.as_deref())?;
    let marker = match &settings.join_from {
        Some(other) => join_fleet(&folder, other, &place, &settings.san),
        None => make_fleet(&folder, &place, &settings.san),
    }?;
    folder.give_to_owner()?;
    Ok(marker)
}

/// The marker comes last: what a crash left half made is made anew.
pub(crate) fn make_fleet(folder: &Folder, place: &Place, sans: &[String]) -> Result<Marker, Error> {
    Authority::create(&folder.path("pki"), sans)?;
    let fleet = hex::encode(&random::<16>());
    match place {
        Place::Folder => {
            let file = folder.store_file();
            for left_over in [file.clone(), file.with_extension("db-wal"), file.with_extension("db-shm")] {
                match fs::remove_file(&left_over) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(folder::io_error("remove", &left_over)(error).into());
                    }
                    Ok(()) | Err(_) => {}
                }
            }
            drop(EmbeddedStore::create(&file)?);
        }
        Place::Postgres(target) => postgres::prepare(target, &fleet, true)?,
    }
    let marker = Marker { fleet, sans: sans.to_vec(), store: place.kind() };
    folder.mark(&marker)?;
    Ok(marker)
}

/// The same fleet and its CA, with a certificate of its own.
fn join_fleet(folder: &Folder, other: &Path, place: &Place, sans: &[String]) -> Result<Marker, Error> {
    let Place::Postgres(target) = place else { return Err(Error::JoinNeedsStore) };
    let theirs = folder::read_marker(&other.join("fleet.toml"))?;
    let Some(theirs) = theirs else {
        return Err(folder::Error::Empty { folder: other.display().to_string() }.into());
    };
    Authority::copy(&other.join("pki"), &folder.path("pki"), sans)?;
    postgres::prepare(target, &theirs.fleet, false)?;
    let marker = Marker { fleet: theirs.fleet, sans: sans.to_vec(), store: place.kind() };
    folder.mark(&marker)?;
    Ok(marker)
}

/// Where the fleet's state is kept.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// In the data folder.
    Folder,
    /// In a data base that several coordinators share.
    Postgres(Target),
}

impl Place {
    pub(crate) fn new(url: Option<&str>, ca: Option<&Path>) -> Result<Self, Error> {
        Ok(match url {
            Some(url) => Self::Postgres(Target::parse(url, ca)?),
            None => Self::Folder,
        })
    }

    pub(crate) fn kind(&self) -> StoreKind {
        match self {
            Self::Folder => StoreKind::Folder,
            Self::Postgres(_) => StoreKind::Postgres,
        }
    }
}
