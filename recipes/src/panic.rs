//! Panics turned into one line: of the training loop, and of libraries that read what others wrote. They are here since all
//! who catch one stand on this crate.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::Once;

thread_local! {
    /// Whether a panic of this thread is going to be caught here.
    static CATCHING: Cell<bool> = const { Cell::new(false) };
    /// File and line of the last such panic.
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `body`; a panic becomes its text and place, and prints nothing.
pub fn catch<T>(body: impl FnOnce() -> T) -> Result<T, String> {
    install();
    let outer = CATCHING.replace(true);
    // What the panic leaves half done is owned by `body` and dropped with it.
    let result = catch_unwind(AssertUnwindSafe(body));
    CATCHING.set(outer);
    result.map_err(|payload| match PLACE.take() {
        Some(place) => format!("{} ({place})", text(&*payload)),
        None => text(&*payload),
    })
}

/// What a panic said, on one line.
pub fn text(payload: &(dyn Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("panic without a message");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Makes caught panics silent; all others go to the hook that was there before.
fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            if CATCHING.get() {
                PLACE.set(info.location().map(ToString::to_string));
            } else {
                before(info);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_one_line_with_its_place() {
        let message = catch(|| panic!("row {} is\nbroken", 3)).unwrap_err();
        assert!(message.starts_with("row 3 is broken ("), "{message}");
        assert!(message.contains("panic.rs:"), "{message}");
    }

    #[test]
    fn without_a_panic_the_value_comes_through() {
        assert_eq!(catch(|| 7), Ok(7));
    }
}
