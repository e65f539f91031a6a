//! A policy that decides.

use std::path::{Path, PathBuf};
use std::time::Duration;

use regorus::{Engine, Value};

use crate::denial::shown;
use crate::error::located;
use crate::{Denial, Error, Request, Result, source};

/// The package of policies, or what its name begins with.
const PACKAGE: &str = "mayu";

/// What a pod may be. It holds all that it needs, and opens nothing once it is loaded.
#[derive(Clone, Debug)]
pub struct Policy {
    path: PathBuf,
    /// Such as `data.mayu`.
    package: String,
    engine: Engine,
}

impl Policy {
    /// Reads the policy at `path`, and those beside it that it refers to.
    ///
    /// # Errors
    /// As [`Policy::parse`], and [`Error::Read`].
    pub fn load(path: &Path) -> Result<Self> {
        Self::parse(&source::read(path)?, path)
    }

    /// Parses the text of the policy at `path`, which messages name, and beside which it looks for others.
    ///
    /// # Errors
    /// [`Error::Parse`] with line and column, [`Error::Package`], or [`Error::NoDeny`].
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let mut engine = source::engine();
        // What it prints is not for the shim's standard error, which is its log.
        engine.set_gather_prints(true);
        let package = source::add(&mut engine, text.into(), path)?;
        let found = source::without_data(&package);
        if found != PACKAGE && !found.starts_with(&format!("{PACKAGE}.")) {
            return Err(Error::Package { path: path.into(), found: found.into(), expected: PACKAGE.into() });
        }
        let deny = format!("{package}.deny");
        if !source::rules(&mut engine).contains(&deny) {
            return Err(Error::NoDeny { path: path.into(), package: found.into() });
        }
        engine
            .compile_with_entrypoint(&deny.as_str().into())
            .map_err(|error| Error::Parse(located(&error)))?;
        Ok(Self { path: path.into(), package, engine })
    }

    /// With another deadline for each decision, by the clock. It is looked at between the policy's steps.
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        source::limit(&mut self.engine, deadline);
        self
    }

    /// The file that it comes from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the policy has against a request; nothing where it is allowed.
    ///
    /// # Errors
    /// [`Error::Evaluate`] where the policy comes to no decision, within its time or at all, and [`Error::Denial`].
    /// Whoever asks has to take either for a no.
    pub fn decide(&self, request: &Request) -> Result<Vec<Denial>> {
        let Value::Set(elements) = self.evaluate("deny", request)? else {
            return Err(Error::NoDeny {
                path: self.path.clone(),
                package: source::without_data(&self.package).into(),
            });
        };
        elements.iter().map(|element| self.denial(element)).collect()
    }

    /// What another rule of the policy's package says of a request; null where it says nothing.
    ///
    /// # Errors
    /// As [`Policy::decide`].
    pub fn ask(&self, rule: &str, request: &Request) -> Result<serde_json::Value> {
        match self.evaluate(rule, request)? {
            Value::Undefined => Ok(serde_json::Value::Null),
            value => Ok(serde_json::to_value(value)?),
        }
    }

    fn evaluate(&self, rule: &str, request: &Request) -> Result<Value> {
        let mut engine = self.engine.clone();
        engine.set_input(Value::from(serde_json::to_value(request)?));
        engine.eval_rule(format!("{}.{rule}", self.package)).map_err(|error| self.undecided(&located(&error)))
    }

    fn undecided(&self, reason: &str) -> Error {
        let place = format!("{}: ", self.path.display());
        let reason = reason.strip_prefix(&place).unwrap_or(reason).to_owned();
        Error::Evaluate { path: self.path.clone(), reason }
    }

    fn denial(&self, element: &Value) -> Result<Denial> {
        let element = serde_json::to_value(element)?;
        let text = element.to_string();
        Denial::from_element(element)
            .ok_or_else(|| Error::Denial { path: self.path.clone(), element: shown(&text) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    fn parse(text: &str) -> Result<Policy> {
        Policy::parse(text, Path::new("/etc/mayu/policy.rego"))
    }

    fn refused(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    fn undecided(text: &str) -> String {
        parse(text).unwrap().decide(&Request::default()).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_policy_is_refused_with_its_place_and_reason() {
        for (text, words) in [
            ("package mayu\n\ndeny contains if", "/etc/mayu/policy.rego: line 3, column "),
            ("package mayu\ndeny[x] { x := 1 }", "/etc/mayu/policy.rego: line 2, column "),
            ("package mayu\ndeny contains x if y", "line 2, column "),
            ("package mayu\ndeny contains http.send({}) if true\nx := \"", "line 3, column "),
            ("package authz\ndeny contains \"no\"", "its package is authz, and has to be mayu"),
            ("package mayuba\ndeny contains \"no\"", "its package is mayuba"),
            ("package mayu\nallow if true", "package mayu has no set `deny`"),
            ("", "line 1, column "),
        ] {
            let message = refused(text);
            assert!(message.starts_with("policy ") && message.contains(words), "{text}: {message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn a_policy_that_comes_to_no_decision_is_an_error() {
        for (text, words) in [
            ("package mayu\ndeny := \"no\"", "no set `deny`"),
            ("package mayu\ndeny contains 7", "an element of `deny` is 7"),
            ("package mayu\ndeny contains {\"rule\": 7}", "an element of `deny` is {\"rule\":7}"),
            ("package mayu\ndeny contains x if x := to_number(\"seven\")", "line 2, column "),
            ("package mayu\ndeny contains x if x := http.send({\"url\": \"http://a\"})", "http.send"),
        ] {
            let message = undecided(text);
            assert!(
                message.contains(words) && message.contains("/etc/mayu/policy.rego"),
                "{text}: {message}"
            );
        }
    }

    #[test]
    fn a_decision_ends() {
        let text = "package mayu\nn := numbers.range(1, 3000)\n\
                    deny contains \"no\" if { some a in n; some b in n; some c in n; a + b + c == 0 }";
        let policy = parse(text).unwrap().with_deadline(Duration::from_millis(10));
        let message = policy.decide(&Request::default()).unwrap_err().to_string();
        assert!(message.contains("time limit"), "{message}");
    }

    #[test]
    fn one_request_leaves_nothing_for_the_next() {
        let policy =
            parse("package mayu\ndeny contains input.pod.name if input.request == \"exec\"").unwrap();
        let mut request = Request { request: Kind::Exec, ..Request::default() };
        request.pod.name = "first".into();
        assert_eq!(policy.decide(&request).unwrap()[0].message, "first");
        request.pod.name = "second".into();
        let denials = policy.decide(&request).unwrap();
        assert_eq!((denials.len(), denials[0].message.as_str()), (1, "second"));
        assert_eq!(policy.decide(&Request::default()).unwrap(), []);
        assert_eq!(policy.ask("deny", &request).unwrap(), serde_json::json!(["second"]));
    }
}
