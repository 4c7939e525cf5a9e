//! The access to an API: its address, credentials and proxy, and their sources.

use std::ops::Deref;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use hyper::Uri;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};

use super::limits;
use crate::registry::RegistryError;

/// The folder of a pod's credentials.
const POD: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Stands for "no proxy is named", so that the library does not look for one itself.
const NO_PROXY_NAMED: &str = "http://proxy.invalid";

/// The source of a configuration, so that it can be read again.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Kubeconfig(PathBuf),
    Pod,
    /// It was given, and does not change.
    Given,
}

/// An API's address, credentials and proxy.
#[derive(Clone)]
pub struct Access {
    config: kube::Config,
    proxy: Option<Intercept>,
    source: Source,
}

impl Deref for Access {
    type Target = kube::Config;

    fn deref(&self) -> &kube::Config {
        &self.config
    }
}

/// The proxy settings of the environment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    https: String,
    http: String,
    all: String,
    exempt: String,
}

impl Environment {
    /// Reads the variables that every client of the API knows.
    pub fn read() -> Self {
        let variable = |names: [&str; 2]| {
            let values = names.into_iter().filter_map(|name| std::env::var(name).ok());
            values.map(|value| value.trim().to_owned()).find(|value| !value.is_empty()).unwrap_or_default()
        };
        Self {
            https: variable(["HTTPS_PROXY", "https_proxy"]),
            http: variable(["HTTP_PROXY", "http_proxy"]),
            all: variable(["ALL_PROXY", "all_proxy"]),
            exempt: variable(["NO_PROXY", "no_proxy"]),
        }
    }

    /// Finds the proxy on the way to a server. What a kubeconfig names counts in any case.
    fn proxy(&self, server: &Uri, named: Option<&str>) -> Option<Intercept> {
        let matcher = match named {
            Some(named) => Matcher::builder().all(named.to_owned()).build(),
            None => {
                let builder = Matcher::builder().https(self.https.clone()).http(self.http.clone());
                builder.all(self.all.clone()).no(self.exempt.clone()).build()
            }
        };
        let found = matcher.intercept(server);
        let wanted = named.or(Some(self.https.as_str()).filter(|https| !https.is_empty()));
        let exempt = named.is_none()
            && Matcher::builder().all("http://p").no(self.exempt.clone()).build().intercept(server).is_none();
        if let Some(wanted) = wanted.filter(|_| found.is_none() && !exempt) {
            // It may hold a password.
            let shown = wanted.rsplit_once('@').map_or(wanted, |(_, address)| address);
            tracing::warn!("{shown:?} is no address of a proxy: {server} is reached without one");
        }
        found
    }
}

impl Access {
    /// Reads how to reach the API: by a kubeconfig file, or as a pod with the files that the cluster mounts.
    ///
    /// # Errors
    /// A sentence that names the file and what is wrong with it.
    pub async fn read(kubeconfig: Option<&Path>) -> Result<Self, RegistryError> {
        let Some(path) = kubeconfig else {
            let config = kube::Config::incluster().map_err(|e| RegistryError::Credentials {
                what: "the pod's service account (registry.kube.kubeconfig names a file where there is none)"
                    .into(),
                reason: e.to_string(),
            })?;
            return Ok(Self::new(config, None, Source::Pod));
        };
        let bad = |reason: String| RegistryError::Credentials {
            what: format!("kubeconfig {}", path.display()),
            reason,
        };
        let file = Kubeconfig::read_from(path).map_err(|e| match e {
            KubeconfigError::ReadConfig(source, _) => bad(source.to_string()),
            // What the parser says may quote what it has read.
            _ => bad("it is no kubeconfig".into()),
        })?;
        Self::parse(file, Source::Kubeconfig(path.to_owned())).await.map_err(|e| bad(e.to_string()))
    }

    /// Takes a kubeconfig that somebody holds, such as a Secret.
    ///
    /// # Errors
    /// As the library's own.
    pub async fn given(file: Kubeconfig) -> Result<Self, KubeconfigError> {
        Self::parse(file, Source::Given).await
    }

    async fn parse(mut file: Kubeconfig, source: Source) -> Result<Self, KubeconfigError> {
        for cluster in file.clusters.iter_mut().filter_map(|named| named.cluster.as_mut()) {
            let named = cluster.proxy_url.take().filter(|url| !url.is_empty());
            cluster.proxy_url = Some(named.unwrap_or_else(|| NO_PROXY_NAMED.to_owned()));
        }
        let context = file.current_context.clone();
        let cluster = file.contexts.iter().find(|named| Some(&named.name) == context.as_ref());
        let cluster = cluster.and_then(|named| Some(named.context.as_ref()?.cluster.clone()));
        let cluster = file.clusters.iter().find(|named| Some(&named.name) == cluster.as_ref());
        let named = cluster.and_then(|named| named.cluster.as_ref()?.proxy_url.clone());
        let named = named.filter(|url| url != NO_PROXY_NAMED);
        let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
        Ok(Self::new(config, named.as_deref(), source))
    }

    fn new(config: kube::Config, proxy: Option<&str>, source: Source) -> Self {
        let proxy = Environment::read().proxy(&config.cluster_url, proxy);
        Self { config: limits(config), proxy, source }
    }

    /// Reads it once more, from where it was read first.
    ///
    /// # Errors
    /// As [`Access::read`].
    pub(super) async fn again(&self) -> Result<Self, RegistryError> {
        match &self.source {
            Source::Kubeconfig(path) => Self::read(Some(path)).await,
            Source::Pod => Self::read(None).await,
            Source::Given => Ok(self.clone()),
        }
    }

    /// Returns the configuration.
    pub(super) fn config(&self) -> &kube::Config {
        &self.config
    }

    /// Returns the proxy on the way, if there is one.
    pub(super) fn proxy(&self) -> Option<&Intercept> {
        self.proxy.as_ref()
    }

    /// Returns whether a program is run for the credentials.
    pub(super) fn runs_a_program(&self) -> bool {
        self.config.auth_info.exec.is_some() || self.config.auth_info.auth_provider.is_some()
    }

    /// Returns where connections go: host and port of the proxy, or else of the API server.
    pub fn reached_at(&self) -> (String, u16) {
        let uri = self.proxy.as_ref().map_or(&self.config.cluster_url, Intercept::uri);
        let port = if uri.scheme_str() == Some("http") { 80 } else { 443 };
        let host = uri.host().unwrap_or_default();
        (host.trim_start_matches('[').trim_end_matches(']').to_owned(), uri.port_u16().unwrap_or(port))
    }

    /// Tells the state of the files that it was read from. Two that are equal have the same content.
    pub(super) fn stamps(&self) -> Vec<Option<Stamp>> {
        let user = &self.config.auth_info;
        let named = [&user.client_certificate, &user.client_key].into_iter().flatten();
        let named = named.map(PathBuf::from).chain(user.token_file.as_ref().map(PathBuf::from));
        let files: Vec<PathBuf> = match &self.source {
            Source::Kubeconfig(path) => std::iter::once(path.clone()).chain(named).collect(),
            Source::Pod => vec![Path::new(POD).join("token")],
            Source::Given => Vec::new(),
        };
        files.iter().map(|file| Stamp::of(file)).collect()
    }
}

impl From<kube::Config> for Access {
    fn from(config: kube::Config) -> Self {
        Self::new(config, None, Source::Given)
    }
}

/// The file attributes that show a change of its contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp {
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: &Path) -> Option<Self> {
        let found = std::fs::metadata(file).ok()?;
        Some(Self { inode: found.ino(), size: found.size(), changed: (found.mtime(), found.mtime_nsec()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through(environment: &Environment, server: &str, named: Option<&str>) -> Option<String> {
        let found = environment.proxy(&server.parse().unwrap(), named);
        found.map(|proxy| proxy.uri().to_string())
    }

    #[test]
    fn proxies_are_chosen_as_kubectl_does() {
        let environment = Environment {
            https: "http://proxy.corp:3128".to_owned(),
            exempt: "fd00:1::/48,10.0.0.0/8,.svc,api.corp, 192.0.2.7".to_owned(),
            ..Environment::default()
        };
        let proxy = Some("http://proxy.corp:3128/".to_owned());
        for (server, wanted) in [
            ("https://203.0.113.5:6443", &proxy),
            ("https://10.1.2.3:6443", &None),
            ("https://192.0.2.7", &None),
            ("https://kubernetes.default.svc", &None),
            ("https://api.corp:6443", &None),
            ("https://api.corp.example", &proxy),
            ("http://203.0.113.5", &None),
            ("https://[fd00:1::5]:6443", &None),
            ("https://[fd00:2::5]:6443", &proxy),
        ] {
            assert_eq!(&through(&environment, server, None), wanted, "{server}");
        }
        let named = through(&environment, "https://10.1.2.3", Some("socks5://127.0.0.1:1080"));
        assert_eq!(named.as_deref(), Some("socks5://127.0.0.1:1080/"), "NO_PROXY is for the environment's");
    }

    #[test]
    fn what_is_no_proxy_is_passed_over() {
        for broken in ["::bad", "ftp://proxy", "http://", "\u{0}"] {
            let environment = Environment { https: broken.to_owned(), ..Environment::default() };
            assert_eq!(through(&environment, "https://192.0.2.1", None), None, "{broken}");
        }
    }

    #[tokio::test]
    async fn kubeconfigs_name_their_proxy() {
        let text = |proxy: &str| {
            format!(
                "apiVersion: v1\nkind: Config\nclusters: [{{name: c, cluster: {{server: 'https://192.0.2.1:6443'{proxy}}}}}]\nusers: [{{name: u, user: {{token: t}}}}]\ncontexts: [{{name: x, context: {{cluster: c, user: u}}}}]\ncurrent-context: x\n"
            )
        };
        let file = |proxy: &str| Kubeconfig::from_yaml(&text(proxy)).unwrap();
        let access = Access::given(file(", proxy-url: 'http://192.0.2.9:3128'")).await.unwrap();
        assert_eq!(access.reached_at(), ("192.0.2.9".to_owned(), 3128));
        let access = Access::given(file("")).await.unwrap();
        assert_eq!(access.reached_at(), ("192.0.2.1".to_owned(), 6443));
    }
}
