// A coloured text that has the focus is read character by character with the arrow keys.
for(const box of document.querySelectorAll('[data-heat]')){
const told=box.parentNode.querySelector('output'),all=[...box.querySelectorAll('span')];let at=-1;
const mark=(n,k)=>all[n]&&all[n].children[k].tagName;
// The token of candidate k that character n is in; marks change where a token ends.
const token=(n,k)=>{const here=mark(n,k);if(here==='U')return 'a token ends inside the character';
let a=n,b=n;while(mark(a-1,k)===here)a--;while(mark(b+1,k)===here)b++;
return '“'+all.slice(a,b+1).map(s=>s.textContent).join('')+'”';};
const go=to=>{if(!all.length)return;if(all[at])all[at].classList.remove('gbs-at');
at=Math.min(Math.max(to,0),all.length-1);const s=all[at];s.classList.add('gbs-at');
s.scrollIntoView({block:'nearest'});const tokens=[...s.children].map((_,k)=>token(at,k));
told.textContent=(at+1)+' of '+all.length+': “'+s.textContent+'” '+s.title+
(tokens.length?'; in tokens '+tokens.join(', '):'');};
box.addEventListener('keydown',e=>{const to={ArrowLeft:at-1,ArrowRight:at+1,Home:0,End:1e9}[e.key];
if(to!==undefined){go(to);e.preventDefault();}});
box.addEventListener('click',e=>{const s=e.target.closest('span');if(s)go(all.indexOf(s));});}
