// What the user chose. Everything but the API key outlives the tab; the key never leaves sessionStorage.

import { say } from "./i18n.js";

const STORE = "indexshare.settings";
const KEY_STORE = "indexshare.key";
const DEFAULTS = { system: "", temperature: "", maxTokens: "", reasoning: "", language: "", reading: false };

export class Settings {
  constructor() {
    this.values = { ...DEFAULTS, ...JSON.parse(localStorage.getItem(STORE) ?? "{}") };
  }

  get key() {
    return sessionStorage.getItem(KEY_STORE) ?? "";
  }

  set(changes) {
    Object.assign(this.values, changes);
    localStorage.setItem(STORE, JSON.stringify(this.values));
  }

  setKey(key) {
    if (key) sessionStorage.setItem(KEY_STORE, key);
    else sessionStorage.removeItem(KEY_STORE);
  }

  /** The fields of a chat request that follow from the settings. What is left empty is not sent. */
  requestFields() {
    const { temperature, maxTokens, reasoning, reading } = this.values;
    const fields = {};
    if (temperature !== "") fields.temperature = Number(temperature);
    if (maxTokens !== "") fields.max_tokens = Number(maxTokens);
    if (reasoning === "off") fields.enable_thinking = false;
    else if (reasoning) fields.reasoning_effort = reasoning;
    if (reading) fields.indexshare = { selected: true };
    return fields;
  }
}

/** The dialog for the settings. `open(true)` asks for the API key; it resolves to whether something was saved. */
export class SettingsDialog {
  #settings;
  #dialog = document.getElementById("settings");
  #form = document.getElementById("settings-form");

  constructor(settings) {
    this.#settings = settings;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      const { key, ...values } = Object.fromEntries(new FormData(this.#form));
      this.#settings.setKey(key.trim());
      this.#settings.set(values);
      this.#dialog.close("saved");
    });
    document.getElementById("settings-cancel").addEventListener("click", () => this.#dialog.close(""));
  }

  open(asksForKey = false) {
    const fields = this.#form.elements;
    for (const name of ["system", "temperature", "maxTokens", "reasoning"]) fields[name].value = this.#settings.values[name];
    fields.key.value = this.#settings.key;
    say(fields.key.parentElement.querySelector("small"), asksForKey ? "api_key_needed" : "api_key_help");
    this.#dialog.classList.toggle("asks", asksForKey);
    if (this.#dialog.open) return Promise.resolve(false);
    this.#dialog.returnValue = "";
    this.#dialog.showModal();
    if (asksForKey) fields.key.focus();
    return new Promise((resolve) => {
      this.#dialog.addEventListener("close", () => resolve(this.#dialog.returnValue === "saved"), { once: true });
    });
  }
}
