//! `mastio gateway`: what the gateway is to be, as one YAML file.
//!
//! The file has no secrets. A member of a credential whose name ends in `_env` names a variable of this command's
//! environment, and its value takes the member's place on the way to the server.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::gateway::{secret, server};
use super::{Failure, Target, ask, on_terminal, pretty, print, read_text, show, table, tell};

const CONFIG: [&str; 3] = ["v1", "admin", "mcp-config"];

#[derive(Debug, Subcommand)]
pub(super) enum GatewayCommand {
    /// Write MCP servers, decisions about tools, bindings and policies as YAML on standard output.
    Export {
        #[command(flatten)]
        target: Target,
    },
    /// Say what importing a file would change, and change nothing.
    Plan {
        #[command(flatten)]
        declared: Declared,
        #[command(flatten)]
        target: Target,
    },
    /// Take up a file in one commit. What it does not name stays, unless it is pruned.
    Import {
        #[command(flatten)]
        declared: Declared,
        /// Do not ask.
        #[arg(long, short)]
        yes: bool,
        /// Only if the plan is still the one with this digest; see `plan`.
        #[arg(long, value_name = "DIGEST")]
        plan_digest: Option<String>,
        #[command(flatten)]
        target: Target,
    },
}

#[derive(Debug, Args)]
pub(super) struct Declared {
    /// The file, YAML; `-` for standard input.
    #[arg(value_name = "FILE.yaml")]
    file: PathBuf,
    /// Remove what the file does not name, of the kinds that it names.
    #[arg(long)]
    prune: bool,
}

impl Declared {
    fn body(&self) -> Result<Value, Failure> {
        let text = read_text(&self.file, "the file")?;
        Ok(json!({ "document": document(&text, &self.file)?, "prune": self.prune }))
    }
}

fn document(text: &str, file: &Path) -> Result<Value, Failure> {
    let mut read: Value = serde_saphyr::from_str(text).map_err(|error| {
        Failure::Usage(format!("{} is not YAML that can be read: {error}", file.display()))
    })?;
    with_secrets(&mut read, &secret)?;
    Ok(read)
}

/// Puts the values of the variables that credentials name in their places. A credential is the one place for them: what
/// stands elsewhere is shown to whoever may look.
fn with_secrets(read: &mut Value, secret: &dyn Fn(&str) -> Result<String, Failure>) -> Result<(), Failure> {
    let upstreams = read.get_mut("upstreams").and_then(Value::as_array_mut);
    for auth in
        upstreams.into_iter().flatten().filter_map(|upstream| upstream.get_mut("auth")?.as_object_mut())
    {
        for (name, value) in std::mem::take(auth) {
            match (name.strip_suffix("_env"), &value) {
                (Some(member), Value::String(variable)) => {
                    auth.insert(member.to_owned(), Value::String(secret(variable)?));
                }
                _ => {
                    auth.insert(name, value);
                }
            }
        }
    }
    Ok(())
}

pub(super) async fn run(command: GatewayCommand) -> Result<(), Failure> {
    match command {
        GatewayCommand::Export { target } => {
            let document = server(&target)?.get(&CONFIG, &[]).await?;
            if target.json {
                return print(&pretty(&document));
            }
            let text = serde_saphyr::to_string(&document)
                .map_err(|error| Failure::because("the document cannot be written as YAML", error))?;
            print(text.trim_end())
        }
        GatewayCommand::Plan { declared, target } => {
            let body = declared.body()?;
            let plan = server(&target)?.post(&[&CONFIG[..], &["plan"]].concat(), &body).await?;
            show(&target, &plan, table::config_plan)
        }
        GatewayCommand::Import { declared, yes, plan_digest, target } => {
            let mut body = declared.body()?;
            let remote = server(&target)?;
            let plan_digest = match (plan_digest, yes) {
                (None, false) => {
                    on_terminal("importing changes who may call what", "--yes")?;
                    let plan = remote.post(&[&CONFIG[..], &["plan"]].concat(), &body).await?;
                    tell(&table::config_plan(&plan))?;
                    ask("import this")?;
                    plan["plan_digest"].as_str().map(str::to_owned)
                }
                (digest, _) => digest,
            };
            body["plan_digest"] = json!(plan_digest);
            let done = remote.post(&[&CONFIG[..], &["import"]].concat(), &body).await?;
            show(&target, &done, table::config_plan)
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_variable_s_value_takes_the_place_of_its_name_and_a_missing_one_is_refused() {
        let secret = |variable: &str| match variable {
            "DOCS_TOKEN" => Ok("t0ken".to_owned()),
            other => Err(Failure::Usage(format!("{other} is not set"))),
        };
        let text = "upstreams:\n- name: docs\n  auth: { type: bearer, secret_env: DOCS_TOKEN }\n";
        let mut read: Value = serde_saphyr::from_str(text).unwrap();
        with_secrets(&mut read, &secret).unwrap();
        assert_eq!(read["upstreams"][0]["auth"], json!({ "type": "bearer", "secret": "t0ken" }));
        let mut read = json!({ "upstreams": [{ "auth": { "secret_env": "OTHER" } }] });
        assert_eq!(with_secrets(&mut read, &secret).unwrap_err().to_string(), "OTHER is not set");
        // Nothing is filled in where anybody may read it.
        let mut read = json!({ "upstreams": [{ "description_env": "DOCS_TOKEN" }] });
        with_secrets(&mut read, &secret).unwrap();
        assert_eq!(read, json!({ "upstreams": [{ "description_env": "DOCS_TOKEN" }] }));
    }

    #[test]
    fn a_file_that_is_no_yaml_is_refused_with_its_line() {
        let refused =
            document("upstreams:\n- name: docs\n  endpoint_url: [\n", Path::new("g.yaml")).unwrap_err();
        let said = refused.to_string();
        assert!(said.starts_with("g.yaml is not YAML") && said.contains("line 3"), "{said}");
        let twice = document("tools: []\ntools: []\n", Path::new("g.yaml")).unwrap_err().to_string();
        assert!(twice.contains("line 2"), "{twice}");
    }

    #[test]
    fn what_is_exported_reads_back_as_it_was() {
        let document = json!({ "policies": [{
            "name": "p", "mode": "enforce", "tool": null,
            "text": "forbid(principal, action, resource)\nwhen { context.arguments.a like \"#: *\" };\n",
        }], "upstreams": [{ "name": "1.0", "enabled": true, "timeout_ms": 60000, "endpoint_url": "https://a:1/b?c=%20#d" }] });
        let text = serde_saphyr::to_string(&document).unwrap();
        assert_eq!(serde_saphyr::from_str::<Value>(&text).unwrap(), document, "{text}");
    }
}
