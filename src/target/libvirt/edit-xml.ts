import type { XmlElement } from '../../libvirt/xml.js';

export function removeElement(element: XmlElement | null): void {
  element?.parentNode?.removeChild(element);
}

/** Puts a copy of an element, also one of another document, where `old` is. */
export function replaceElement(old: XmlElement, other: XmlElement): void {
  const copy = old.ownerDocument?.importNode(other, true);
  if (copy !== undefined) old.parentNode?.replaceChild(copy, old);
}

/** A new first child. */
export function makeChild(parent: XmlElement, name: string): XmlElement {
  const document = parent.ownerDocument;
  if (document === null) throw new TypeError('an element without a document');
  const child = document.createElement(name);
  parent.insertBefore(child, parent.firstChild);
  return child;
}
