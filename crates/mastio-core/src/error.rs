//! The coarse class that every error reduces to.

/// What kind of failure an error is, seen from the caller. `mastio`'s `http/error.rs` alone maps it to a status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request is not what it should be: 400.
    Invalid,
    /// The body has the wrong shape: 422.
    Unprocessable,
    /// Nobody proved who is calling: 401.
    Unauthenticated,
    /// The caller is known and may not: 403.
    Denied,
    /// There is no such thing, or the caller may not know of it: 404.
    NotFound,
    /// The state of the world forbids it: 409.
    Conflict,
    /// Something else has to be done first: 412.
    OutOfOrder,
    /// The request took too long to arrive: 408.
    TimedOut,
    /// The request is larger than its bound: 413.
    TooLarge,
    /// Too many requests: 429.
    Limited,
    /// Signing is halted: 503 with `Retry-After`.
    Halted,
    /// We cannot serve it right now: 503 with `Retry-After`.
    Unavailable,
    /// Our fault: 500, and the detail stays in the log.
    Internal,
}
