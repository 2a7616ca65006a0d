//! What an object store answered, and what to do about it.

use std::{error::Error as _, fmt, io, time::Duration};

use object_store::Error;

/// Why an object store did not do what was asked.
#[derive(Debug)]
pub struct Refusal {
    kind: Kind,
    cause: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Missing,
    NoBucket,
    Conflict,
    BeyondEnd,
    Denied,
    NoCredentials,
    Silent,
    Unreachable,
    PlainHttp,
    Region,
    NoCondition,
    Full,
    Other,
}

/// What the messages of servers and of the library hold, lower case, most telling first.
const SIGNS: [(&str, Kind); 18] = [
    ("nosuchbucket", Kind::NoBucket),
    ("bucket does not exist", Kind::NoBucket),
    ("invalidrange", Kind::BeyondEnd),
    ("416 range", Kind::BeyondEnd),
    ("requested range", Kind::BeyondEnd),
    ("169.254.169.254", Kind::NoCredentials),
    ("metadata.google", Kind::NoCredentials),
    ("url scheme is not allowed", Kind::PlainHttp),
    ("storagefull", Kind::Full),
    ("quotaexceeded", Kind::Full),
    ("insufficient storage", Kind::Full),
    ("permanentredirect", Kind::Region),
    ("authorizationheadermalformed", Kind::Region),
    ("notimplemented", Kind::NoCondition),
    ("timed out", Kind::Silent),
    ("connection refused", Kind::Unreachable),
    ("dns error", Kind::Unreachable),
    ("error trying to connect", Kind::Unreachable),
];

impl Refusal {
    pub(super) fn of(error: Error, patience: Duration) -> Refusal {
        let cause = causes(&error);
        let text = cause.to_lowercase();
        let sign = SIGNS.iter().find(|(sign, _)| text.contains(sign));
        let kind = match (&error, sign) {
            (_, Some((_, kind))) => *kind,
            (Error::NotImplemented { .. } | Error::NotSupported { .. }, None) => Kind::NoCondition,
            (Error::NotFound { .. }, None) => Kind::Missing,
            (Error::AlreadyExists { .. } | Error::Precondition { .. }, None) => Kind::Conflict,
            (Error::PermissionDenied { .. } | Error::Unauthenticated { .. }, None) => Kind::Denied,
            _ => Kind::Other,
        };
        match kind {
            Kind::Silent => Refusal::silent(patience),
            _ => Refusal { kind, cause },
        }
    }

    pub(super) fn silent(patience: Duration) -> Refusal {
        let cause = format!(
            "the store did not answer within {:.0} s",
            patience.as_secs_f64().max(1.0)
        );
        Refusal {
            kind: Kind::Silent,
            cause,
        }
    }

    pub(super) fn other(cause: String) -> Refusal {
        Refusal {
            kind: Kind::Other,
            cause,
        }
    }

    /// Whether there is no such object.
    pub fn is_missing(&self) -> bool {
        self.kind == Kind::Missing
    }

    /// Whether there is one already.
    pub fn is_conflict(&self) -> bool {
        self.kind == Kind::Conflict
    }

    /// Whether another try may succeed without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        matches!(
            self.kind,
            Kind::Silent | Kind::Unreachable | Kind::Full | Kind::Other
        )
    }

    /// Whether the object is shorter than what was asked for.
    pub(super) fn is_beyond_end(&self) -> bool {
        self.kind == Kind::BeyondEnd
    }

    fn remedy(&self) -> &'static str {
        match self.kind {
            Kind::Missing | Kind::BeyondEnd | Kind::Conflict | Kind::Other => "",
            Kind::NoBucket => ". Create the bucket, or correct checkpoint.to",
            Kind::Denied => {
                ". Give the coordinator and every worker credentials that may read, write, list and delete there (AWS_ACCESS_KEY_ID \
                 and AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS)"
            }
            Kind::NoCredentials => {
                ". No credentials are in the environment: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or \
                 GOOGLE_APPLICATION_CREDENTIALS, for the coordinator and every worker"
            }
            Kind::Silent | Kind::Unreachable => {
                ". Check the network, and AWS_ENDPOINT_URL or GOOGLE_BASE_URL if the store is another than Amazon's or Google's"
            }
            Kind::PlainHttp => {
                ". Set AWS_ALLOW_HTTP=true if the store is to be reached without encryption"
            }
            Kind::Region => ". Set AWS_REGION to the bucket's region",
            Kind::NoCondition => {
                ". Checkpoints need a store that knows conditional puts (If-None-Match)"
            }
            Kind::Full => {
                ". Free some room or raise the quota, lower checkpoint.keep, or move checkpoint.to"
            }
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "{}{}", self.cause, self.remedy())
    }
}

impl std::error::Error for Refusal {}

/// So that what writes bytes can hand it on; [`StoredError::writing`](crate::StoredError::writing) takes it out again.
impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> io::Error {
        io::Error::other(refusal)
    }
}

/// An error and what is behind it on one line; the library's own words leave out the system's.
fn causes(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(cause: &str) -> Refusal {
        let error = Error::Generic {
            store: "S3",
            source: cause.into(),
        };
        Refusal::of(error, Duration::from_secs(60))
    }

    #[test]
    fn a_message_names_cause_and_remedy() {
        for (cause, remedy) in [
            (
                "404 Not Found: <Code>NoSuchBucket</Code>",
                "Create the bucket",
            ),
            ("GET http://169.254.169.254/latest", "No credentials"),
            ("HTTP error: URL scheme is not allowed", "AWS_ALLOW_HTTP"),
            ("operation timed out", "within 60 s. Check the network"),
            ("tcp connect error: Connection refused", "AWS_ENDPOINT_URL"),
            ("<Code>XMinioStorageFull</Code>", "Free some room"),
            ("501 <Code>NotImplemented</Code>", "conditional puts"),
        ] {
            let message = generic(cause).to_string();
            assert!(message.contains(remedy), "{message}");
        }
        assert_eq!(
            generic("one\n   two").to_string(),
            "Generic S3 error: one two"
        );
    }
}
