//! What a policy has against a request.

use std::fmt;

use serde::Deserialize;
use serde_json::Value;

/// The longest part of a denial that is repeated, in characters. Part of it may come from the one who was denied.
const MAX_SHOWN: usize = 128;

/// How many denials a message has room for.
const MAX_IN_MESSAGE: usize = 8;

/// One reason for which a request is denied: an element of the policy's set `deny`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Denial {
    /// The rule that it is against, by a name that those who write manifests know.
    pub rule: String,
    /// Where in the request the offence is, such as `spec.process.user.uid`.
    pub field: String,
    /// What the request says there.
    pub value: Value,
    /// What is wrong with it, or what to do instead.
    pub message: String,
}

impl Denial {
    /// From an element of `deny`: an object, or a string that is the message.
    pub(crate) fn from_element(element: Value) -> Option<Self> {
        match element {
            Value::String(message) => Some(Self { message, ..Self::default() }),
            object => serde_json::from_value(object).ok(),
        }
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fact = match (self.field.as_str(), &self.value) {
            ("", Value::Null) => String::new(),
            (field, Value::Null) => shown(field),
            ("", value) => shown(&value.to_string()),
            (field, value) => format!("{} is {}", shown(field), shown(&value.to_string())),
        };
        let parts = [shown(&self.rule), fact, shown(&self.message)];
        let said: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        f.write_str(&said.join(": "))
    }
}

/// All denials of one request in one line, of bounded length.
pub fn summary(denials: &[Denial]) -> String {
    let mut parts: Vec<_> = denials.iter().take(MAX_IN_MESSAGE).map(ToString::to_string).collect();
    if denials.len() > MAX_IN_MESSAGE {
        parts.push(format!("and {} more", denials.len() - MAX_IN_MESSAGE));
    }
    parts.join("; ")
}

/// Text of somebody else's for a message: in one line, and not too long.
pub(crate) fn shown(text: &str) -> String {
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    let mut shown: String = text.chars().take(MAX_SHOWN).map(visible).collect();
    if text.chars().nth(MAX_SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn said(element: Value) -> String {
        Denial::from_element(element).unwrap().to_string()
    }

    #[test]
    fn rule_field_and_value_are_named() {
        let denial =
            json!({"rule": "non-root", "field": "process.user.uid", "value": 0, "message": "be somebody"});
        assert_eq!(said(denial), "non-root: process.user.uid is 0: be somebody");
        assert_eq!(said(json!({"rule": "no exec", "field": "request"})), "no exec: request");
        assert_eq!(said(json!("not on Sundays")), "not on Sundays");
    }

    #[test]
    fn what_is_no_denial_is_none() {
        for element in [json!(1), json!({"rule": 1}), json!({"reason": "x"}), json!(null)] {
            assert_eq!(Denial::from_element(element.clone()), None, "{element}");
        }
    }

    #[test]
    fn a_message_is_bounded_and_one_line_whatever_is_denied() {
        let hostile = "\u{1f98b}\n".repeat(10_000);
        let denial = Denial {
            rule: hostile.clone(),
            field: hostile.clone(),
            value: json!([hostile.clone()]),
            message: hostile,
        };
        let message = summary(&vec![denial; 20]);
        assert!(message.len() < 20_000, "{}", message.len());
        assert!(message.ends_with("; and 12 more") && !message.contains('\n'), "{message}");
    }
}
