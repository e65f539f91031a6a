//! What the operator has decided for a pod: the configuration, and the policy that it names. Both are read once, when the pod
//! is made, and hold for its life.

use std::path::Path;

use mayu_policy::{Kind, Policy, Request, summary};
use oci_spec::runtime::{LinuxResources, Process, Spec};

use crate::config::Config;
use crate::pod_spec::{PodSpec, Size};
use crate::snapshot::Wish;
use crate::spec::annotation;
use crate::{Error, Result, annotations};

/// The annotation by which CRI says what a container is called in its pod.
const CONTAINER_NAME: &str = "io.kubernetes.cri.container-name";

/// The annotation by which CRI says which image a container is made from.
const IMAGE_NAME: &str = "io.kubernetes.cri.image-name";

/// What decides over one pod.
#[derive(Debug)]
pub struct Admission {
    /// The configuration, with what the pod's annotations change in it.
    pub config: Config,
    /// What the pod says about its snapshot, if it is to have one.
    pub wish: Option<Wish>,
    policy: Option<Policy>,
    namespace: String,
    pod: mayu_policy::Pod,
}

/// A container as a policy knows it, beside its spec.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    container: mayu_policy::Container,
    image: String,
}

impl Subject {
    /// The container with this id and spec.
    pub fn new(id: &str, spec: &Spec) -> Self {
        let name = annotation(spec, CONTAINER_NAME).unwrap_or(id).to_owned();
        let image = annotation(spec, IMAGE_NAME).unwrap_or_default().to_owned();
        Self { container: mayu_policy::Container { id: id.into(), name }, image }
    }
}

impl Admission {
    /// Reads the configuration file at `path`, and the policy where it names one, for the pod with this id.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Annotation`] or [`Error::Policy`].
    pub fn load(path: &Path, namespace: &str, id: &str, spec: &PodSpec) -> Result<Self> {
        let config = Config::load_from(path)?;
        let deadline = config.timeouts.request();
        let load = |path: &Path| Ok::<_, Error>(Policy::load(path)?.with_deadline(deadline));
        let policy = config.policy.as_deref().map(load).transpose()?;
        let mut admission = Self::new(config, namespace, spec)?;
        admission.pod.id = id.into();
        Ok(Self { policy, ..admission })
    }

    /// Without a policy: what requests would look like under this configuration.
    ///
    /// # Errors
    /// [`Error::Annotation`].
    pub fn new(mut config: Config, namespace: &str, spec: &PodSpec) -> Result<Self> {
        annotations::apply(&mut config, &spec.annotations)?;
        let wish = Wish::read(&spec.annotations)?;
        Ok(Self { config, wish, policy: None, namespace: namespace.into(), pod: spec.about.clone() })
    }

    /// Decides on a request, which is not even made where there is no policy.
    ///
    /// # Errors
    /// [`Error::Denied`], or [`Error::Policy`] where the policy comes to no decision.
    pub fn decide(&self, request: impl FnOnce() -> Request) -> Result<()> {
        let Some(policy) = &self.policy else { return Ok(()) };
        let denials = policy.decide(&request())?;
        if denials.is_empty() {
            return Ok(());
        }
        Err(Error::Denied { policy: policy.path().into(), reasons: summary(&denials) })
    }

    /// For a VM of this size, for the pod.
    pub fn pod(&self, size: Size) -> Request {
        Request {
            request: Kind::Pod,
            namespace: self.namespace.clone(),
            pod: self.pod.clone(),
            size: size.into(),
            ..Request::default()
        }
    }

    /// For a container, with which the VM is of this size.
    pub fn container(&self, subject: &Subject, spec: &Spec, size: Size) -> Request {
        Request { spec: Some(spec.clone()), ..self.about(Kind::Container, subject, size) }
    }

    /// For one more process in a container.
    pub fn exec(&self, subject: &Subject, process: &Process, size: Size) -> Request {
        Request { process: Some(process.clone()), ..self.about(Kind::Exec, subject, size) }
    }

    /// For other limits of a container, with which the VM is of this size.
    pub fn resize(&self, subject: &Subject, resources: &LinuxResources, size: Size) -> Request {
        Request { resources: Some(resources.clone()), ..self.about(Kind::Resize, subject, size) }
    }

    fn about(&self, kind: Kind, subject: &Subject, size: Size) -> Request {
        Request {
            request: kind,
            container: Some(subject.container.clone()),
            image: Some(subject.image.clone()),
            ..self.pod(size)
        }
    }
}
