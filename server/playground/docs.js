// The API's description: /openapi.json as a page to read and to try. Addresses are relative.

const EXAMPLES = {
  "/v1/chat/completions": { messages: [{ role: "user", content: "Why is the sky blue?" }], max_tokens: 40 },
  "/v1/completions": { prompt: "Once upon a time", max_tokens: 40 },
  "/tokenize": { prompt: "Once upon a time" },
  "/detokenize": { tokens: [1, 2, 3] },
};
const LIMITS = {
  minimum: "at least", maximum: "at most", exclusiveMinimum: "above", exclusiveMaximum: "below",
  minLength: "characters, at least", maxLength: "characters, at most", minItems: "entries, at least",
  maxItems: "entries, at most", maxProperties: "entries, at most", pattern: "pattern",
};

// An element with text and elements inside; `attributes` are set as properties.
function make(name, attributes, ...inside) {
  const element = Object.assign(document.createElement(name), attributes);
  element.append(...inside.filter((part) => part !== null && part !== ""));
  return element;
}

const nameOf = (reference) => reference.split("/").pop();

function link(reference) {
  return make("a", { href: `#${nameOf(reference)}` }, nameOf(reference));
}

// ---- types -------------------------------------------------------------------------------------

// What a schema allows, as texts and links.
function typeOf(schema) {
  if (schema.$ref) return [link(schema.$ref)];
  if (schema.const !== undefined) return [JSON.stringify(schema.const)];
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(", ")];
  const choices = schema.anyOf ?? schema.oneOf ?? schema.allOf;
  if (choices) return between(choices.filter((one) => one.type !== "null").map(typeOf), " or ");
  if (schema.type === "array" && schema.items) return ["list of ", ...typeOf(schema.items)];
  if (schema.prefixItems) return ["list of ", ...between(schema.prefixItems.map(typeOf), ", ")];
  const types = [schema.type ?? "anything"].flat().filter((type) => type !== "null");
  return [types.join(" or ")];
}

function between(lists, separator) {
  return lists.flatMap((parts, index) => (index ? [separator, ...parts] : parts));
}

function limitsOf(schema) {
  const parts = [schema, ...(schema.anyOf ?? [])];
  const found = parts.flatMap((part) => Object.entries(LIMITS).filter(([key]) => key in part).map(([key, word]) => `${word} ${part[key]}`));
  const preset = schema.default === undefined ? [] : [`default ${JSON.stringify(schema.default)}`];
  return [...found, ...preset].join("; ");
}

function table(headings, rows) {
  const head = make("tr", {}, ...headings.map((text) => make("th", { scope: "col" }, text)));
  return make("div", { className: "wide_table" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

function fieldsOf(schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) => {
    const isRequired = schema.required?.includes(name);
    return make("tr", {},
      make("td", {}, make("code", { className: isRequired ? "required" : "" }, name)),
      make("td", {}, ...typeOf(field)),
      make("td", {}, limitsOf(field)),
      make("td", {}, field.description ?? ""));
  });
  return rows.length ? table(["Field", "Type", "Limits", "What it means"], rows) : make("p", { className: "hint" }, ...typeOf(schema));
}

// ---- routes ------------------------------------------------------------------------------------

function route(path, method, operation) {
  const body = operation.requestBody?.content["application/json"]?.schema;
  const answers = Object.entries(operation.responses).map(([status, answer]) => {
    const schemas = Object.values(answer.content ?? {}).map(({ schema }) => schema).filter((schema) => schema?.$ref);
    return make("tr", {}, make("td", {}, status), make("td", {}, answer.description ?? ""), make("td", {}, ...schemas.flatMap(typeOf)));
  });
  const parts = [title(path, method), make("p", {}, operation.description ?? "")];
  if (body) parts.push(make("p", {}, "Body: ", ...typeOf(body)));
  parts.push(table(["Status", "When", "Body"], answers), attempt(path, method, Boolean(body)));
  return make("article", { className: "panel", id: anchor(path, method) }, ...parts);
}

const anchor = (path, method) => `${method}${path.replaceAll(/\W/g, "-")}`;

function title(path, method) {
  return make("h2", {}, make("span", { className: "method" }, method.toUpperCase()), " ", make("code", {}, path));
}

// ---- trying ------------------------------------------------------------------------------------

let model = "default";

function attempt(path, method, hasBody) {
  const text = JSON.stringify({ model, ...EXAMPLES[path] }, null, 2);
  const input = make("textarea", { className: "body", rows: 7, value: text, spellcheck: false, ariaLabel: `Body of ${path}` });
  const where = make("input", { value: path.replace(/\{[^}]+\}/, model), ariaLabel: "Path" });
  const answer = make("pre", { hidden: true, tabIndex: 0, ariaLabel: `Answer of ${path}` });
  const button = make("button", { type: "button" }, "Send");
  button.addEventListener("click", async () => {
    answer.hidden = false;
    answer.textContent = "…";
    answer.textContent = await send(where.value, method, hasBody ? input.value : undefined);
  });
  const inside = make("div", { className: "try" }, path.includes("{") ? where : "", hasBody ? input : "", button, answer);
  return make("details", {}, make("summary", {}, "Try it"), inside);
}

async function send(path, method, body) {
  const key = document.getElementById("key").value.trim();
  const headers = { ...(body && { "content-type": "application/json" }), ...(key && { authorization: `Bearer ${key}` }) };
  try {
    const response = await fetch(path.slice(1), { method: method.toUpperCase(), headers, body });
    return `${response.status} ${response.statusText}\n\n${pretty(await response.text())}`;
  } catch {
    return "The server can't be reached.";
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

// ---- the page ----------------------------------------------------------------------------------

async function show() {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  const description = await response.json();
  const { info, paths, components } = description;
  document.getElementById("about").textContent = `${info.description} Version ${info.version}. A field that is null counts as absent; one that isn't known is refused by name.`;
  model = components.schemas.CompletionRequest?.properties.model.enum?.[0] ?? model;
  const routes = Object.entries(paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, operation]) => [path, method, operation]));
  document.getElementById("contents").append(...routes.map(([path, method]) => make("a", { href: `#${anchor(path, method)}` }, `${method.toUpperCase()} ${path}`)));
  document.getElementById("routes").append(...routes.map((one) => route(...one)));
  const objects = Object.entries(components.schemas).map(([name, schema]) =>
    make("article", { className: "panel", id: name }, make("h2", {}, name), make("p", {}, schema.description ?? ""), fieldsOf(schema)));
  document.getElementById("objects").append(...objects);
}

show().catch((error) => {
  document.getElementById("about").textContent = `The description can't be read: ${error.message}.`;
});
