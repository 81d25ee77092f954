//! `inventory.img`: how the dump was made.

use prost::Message;

use super::ImageError;

/// The only word before the message: the inventory has no common magic (`criu/image.c:write_img_magic`).
const INVENTORY_MAGIC: u32 = 0x5831_3116;

/// `network_lock_method` (field 11, a varint) is "skip" (2; `criu/include/cr_options.h`).
const SKIP_NETWORK_LOCK: [u8; 2] = [11 << 3, 2];

#[derive(Clone, PartialEq, Message)]
struct InventoryEntry {
    #[prost(string, optional, tag = "13")]
    dump_criu_run_id: Option<String>,
}

/// The name of the run of CRIU that made the dump, which its lock on the network carries too.
pub fn run_id(file: &[u8]) -> Result<Option<String>, ImageError> {
    Ok(InventoryEntry::decode(message(file)?)?.dump_criu_run_id)
}

/// The one message of an inventory.
fn message(file: &[u8]) -> Result<&[u8], ImageError> {
    let word = |at: usize| -> Result<u32, ImageError> {
        let bytes = file.get(at..at + 4).ok_or(ImageError::Truncated(at))?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let magic = word(0)?;
    if magic != INVENTORY_MAGIC {
        return Err(ImageError::Magic {
            found: [magic, 0],
            expected: [INVENTORY_MAGIC, 0],
        });
    }
    let length = word(4)? as usize;
    let message = &file[8..];
    if message.len() != length {
        return Err(ImageError::Truncated(file.len()));
    }
    Ok(message)
}

/// The inventory with the word that no network was locked: CRIU then unlocks none when it restores.
///
/// A field given twice counts as given last, so what else the message says need not be understood.
pub fn without_network_lock(file: &[u8]) -> Result<Vec<u8>, ImageError> {
    let message = message(file)?;
    let length = (message.len() + SKIP_NETWORK_LOCK.len()) as u32;
    Ok([
        &file[..4],
        &length.to_le_bytes(),
        message,
        &SKIP_NETWORK_LOCK,
    ]
    .concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, PartialEq, Message)]
    struct Inventory {
        #[prost(uint32, required, tag = "1")]
        version: u32,
        #[prost(uint32, optional, tag = "11")]
        network_lock_method: Option<u32>,
        #[prost(string, optional, tag = "13")]
        run: Option<String>,
    }

    fn file(inventory: &Inventory) -> Vec<u8> {
        let message = inventory.encode_to_vec();
        let length = (message.len() as u32).to_le_bytes();
        [&INVENTORY_MAGIC.to_le_bytes()[..], &length, &message].concat()
    }

    #[test]
    fn only_the_lock_changes() {
        for network_lock_method in [None, Some(0), Some(1)] {
            let inventory = Inventory {
                version: 1,
                network_lock_method,
                run: Some(String::from("run")),
            };
            assert_eq!(
                run_id(&file(&inventory)).expect("an inventory").as_deref(),
                Some("run")
            );
            let changed = without_network_lock(&file(&inventory)).expect("an inventory");
            let length = u32::from_le_bytes(changed[4..8].try_into().expect("four bytes"));
            assert_eq!(length as usize, changed.len() - 8);
            let expected = Inventory {
                network_lock_method: Some(2),
                ..inventory
            };
            assert_eq!(Inventory::decode(&changed[8..]), Ok(expected));
        }
    }

    #[test]
    fn other_files_and_pieces_are_refused() {
        let whole = file(&Inventory::default());
        for end in 0..whole.len() {
            assert!(without_network_lock(&whole[..end]).is_err(), "{end} bytes");
        }
        assert!(without_network_lock(&[0; 16]).is_err());
    }
}
