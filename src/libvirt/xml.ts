import { DOMParser, XMLSerializer, type Document, type Element } from '@xmldom/xmldom';
import { AppError } from '../lib/errors.js';
import { MIB } from '../lib/units.js';

export type { Document as XmlDocument, Element as XmlElement } from '@xmldom/xmldom';

/** libvirt's own limit for a string over its protocol (REMOTE_STRING_MAX). */
const MAX_BYTES = 4 * MIB;
const MAX_DEPTH = 128;

function refused(why: string, cause?: unknown): AppError {
  return new AppError('SOURCE_FORMAT', `the XML cannot be used: ${why}`, { cause });
}

/**
 * Parses XML that libvirt sent or a user gave. Rejects with SOURCE_FORMAT what is larger than 4 MiB, is nested
 * deeper than 128 elements, has a document type (entities), or is not well formed.
 */
export function parseXml(text: string): Document {
  if (Buffer.byteLength(text) > MAX_BYTES) throw refused(`it is larger than ${MAX_BYTES} bytes`);
  if (text.includes('<!DOCTYPE') || text.includes('<!ENTITY')) throw refused('it has a document type');
  let document: Document;
  try {
    document = new DOMParser({
      onError: (level, message) => {
        throw new Error(`${level}: ${message}`);
      },
    }).parseFromString(text, 'text/xml');
  } catch (error) {
    throw refused('it is not well formed', error);
  }
  if (document.documentElement === null) throw refused('it has no element');
  if (isDeeperThan(document.documentElement, MAX_DEPTH)) {
    throw refused(`it is nested deeper than ${MAX_DEPTH} elements`);
  }
  return document;
}

/** The root element, which must be `<name>`; SOURCE_FORMAT when it is not. */
export function rootElement(document: Document, name: string): Element {
  const root = document.documentElement;
  if (root === null || root.nodeName !== name) throw refused(`it is not a <${name}>`);
  return root;
}

function isElement(node: { nodeType: number }): node is Element {
  return node.nodeType === 1;
}

/** Child elements in document order, all or those of a name without a namespace. */
export function childElements(parent: Element | null | undefined, name?: string): Element[] {
  const found: Element[] = [];
  for (let node = parent?.firstChild ?? null; node !== null; node = node.nextSibling) {
    if (isElement(node) && (name === undefined || node.nodeName === name)) found.push(node);
  }
  return found;
}

/** The element down a path of names (`'os', 'nvram'`), the first at each step; null when there is none. */
export function childAt(parent: Element | null | undefined, ...names: string[]): Element | null {
  let at: Element | null = parent ?? null;
  for (const name of names) at = childElements(at, name)[0] ?? null;
  return at;
}

/** Trimmed text of an element; null when there is no such element or it is empty. */
export function textOf(element: Element | null | undefined): string | null {
  const text = element?.textContent?.trim() ?? '';
  return text === '' ? null : text;
}

/** An attribute's value; null when there is no such element or attribute, or it is empty. */
export function attributeOf(element: Element | null | undefined, name: string): string | null {
  const value = element?.getAttribute(name) ?? '';
  return value === '' ? null : value;
}

/** The text of a document or of one element, with everything escaped that needs it. */
export function serializeXml(node: Document | Element): string {
  return new XMLSerializer().serializeToString(node, { requireWellFormed: true });
}

/** Without recursion: what it guards against would end that. */
function isDeeperThan(root: Element, limit: number): boolean {
  let level = [root];
  for (let depth = 1; level.length > 0; depth += 1) {
    if (depth > limit) return true;
    level = level.flatMap((element) => childElements(element));
  }
  return false;
}
