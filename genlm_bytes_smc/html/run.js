const at=document.getElementById('at'),now=document.getElementById('now');
function text(t,i){const b=[];for(;t>=0;t--){const s=run[t].s[i];if(s>=0&&s<256)b.push(s);
if(t>0&&run[t-1].a)i=run[t-1].a[i];}
return new TextDecoder().decode(new Uint8Array(b.reverse()))
.replace(/[\x00-\x1f\x7f]/g,c=>JSON.stringify(c).slice(1,-1));}
function cell(row,kind,content){const c=row.insertCell();c.className=kind;c.append(content);}
function show(){const t=at.value-1,w=run[t].w.map(x=>x===null?-Infinity:x),m=Math.max(...w);
const p=w.map(x=>m===-Infinity?0:Math.exp(x-m)),sum=p.reduce((a,b)=>a+b,0)||1,seen=new Map();
p.forEach((x,i)=>{const k=text(t,i),e=seen.get(k)||[0,0];e[0]+=x/sum;e[1]++;seen.set(k,e);});
const all=[...seen].sort((a,b)=>b[1][0]-a[1][0]);now.replaceChildren();
for(const [k,[x,n]] of all.slice(0,60)){const r=now.insertRow();cell(r,'n',x.toFixed(4));
const i=document.createElement('i');i.style.width=100*x+'%';cell(r,'bar',i);cell(r,'n','× '+n);
const c=document.createElement('code');c.textContent=k;cell(r,'',c);}
document.getElementById('step').textContent='step '+at.value+' of '+run.length+', '+all.length+
' texts'+(run[t].a?', then resampled':'');}
if(run.length){at.max=run.length;at.value=Math.ceil(run.length/2);at.oninput=show;show();}
